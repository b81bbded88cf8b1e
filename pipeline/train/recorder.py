"""The flight recorder: the last steps as sample positions and numbers, so that a bad one can be named and replayed.

It keeps ids instead of tensors, since the stream is exact: the batch of a data_step can be drawn again at any time.
Everything stays on the device until `dump` or a question is asked.
"""

import json
import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.streaming.loader import Batch

STEPS_KEPT = 256  # at least; more where log lines are farther apart


@dataclass
class Record:
    """One optimizer step on this rank. `data_step`: its place in the data, which differs from `step` after a rewind."""

    step: int
    data_step: int
    samples: dict[str, Tensor]
    loss: Tensor
    block_squares: Tensor | None

    def is_bad(self) -> bool:
        """Whether the loss, or a gradient of it, is not finite."""
        squares = self.block_squares
        return not math.isfinite(float(self.loss)) or (squares is not None and not bool(torch.isfinite(squares).all()))


class Recorder:
    """Of one rank; reaches back to the last log line at least. `watch` sees the gradients of a model before the engine
    reduces and frees them."""

    def __init__(self, log_every: int) -> None:
        self.records: deque[Record] = deque(maxlen=max(STEPS_KEPT, log_every))
        self._unchecked = 0  # the newest records, of the steps since the last log line
        self.blocks: list[str] = []
        self._squares: Tensor | None = None

    def watch(self, model: nn.Module) -> None:
        """Before the engine wraps the model. The norms are of this rank's gradients, over its own micro-batches."""
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.blocks = list(dict.fromkeys(block_of(name) for name, _ in named))
        self._squares = torch.zeros(len(self.blocks), device=named[0][1].device)

        def hook(index: int) -> Any:
            def add(gradient: Tensor) -> None:
                assert self._squares is not None
                self._squares[index] += torch.linalg.vector_norm(gradient.detach().float()).square()

            return add

        for name, parameter in named:
            parameter.register_hook(hook(self.blocks.index(block_of(name))))

    def note(self, step: int, data_step: int, drawn: Mapping[str, Batch], loss: Tensor) -> None:
        """A step is over."""
        squares = None
        if self._squares is not None:
            squares = self._squares.clone()
            self._squares.zero_()
        self._unchecked += 1
        self.records.append(Record(step, data_step, {k: b.indices for k, b in drawn.items()}, loss, squares))

    @property
    def unchecked(self) -> list[Record]:
        """The steps since the last log line, oldest first."""
        return list(self.records)[len(self.records) - self._unchecked :]

    def mark_checked(self) -> None:
        """All steps up to here are good."""
        self._unchecked = 0

    def losses(self) -> Tensor:
        """(kept steps,) of this rank, float64 on the device."""
        return torch.stack([record.loss.double() for record in self.records])

    def forget_from(self, step: int) -> None:
        """Steps that a rewind undoes, among them all that are unchecked."""
        self.records = deque((r for r in self.records if r.step < step), maxlen=self.records.maxlen)
        self._unchecked = 0

    def dump(self, path: Path) -> None:
        """One JSON object a step: samples, loss, gradient norm of every block."""
        lines = []
        for r in self.records:
            squares = [] if r.block_squares is None else r.block_squares.sqrt().tolist()
            row: dict[str, Any] = {"step": r.step, "data_step": r.data_step, "loss": float(r.loss)}
            row |= {"gradient_norms": dict(zip(self.blocks, squares, strict=False))}
            row |= {"samples": {k: v.tolist() for k, v in r.samples.items()}}
            lines.append(json.dumps(row) + "\n")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(lines))


def block_of(name: str) -> str:
    """The block a parameter belongs to: `backbone.layers.3.mixer.D` -> `backbone.layers.3`."""
    parts = name.split(".")
    numbered = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
    return ".".join(parts[: numbered + 1])
