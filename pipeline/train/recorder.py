"""The flight recorder: the last steps as sample indices and numbers, so that a bad step can be named and replayed.

It keeps indices instead of images, since the stream is exact: the batch of a data step can be drawn again at any time.
Everything stays on the device until it is dumped or checked.
"""

import json
import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.files import replace_text
from pipeline.streaming.loader import Batch

STEPS_KEPT = 256  # the least number; more are kept where log lines are farther apart


@dataclass
class Record:
    """One optimizer step on this rank.

    Args:
        step: Optimizer steps before it.
        data_step: The step of the data that it took; after a rewind it differs from `step`.
        samples: Sample indices (B,) by stream.
        loss: Scalar, on the device.
        block_squares: (blocks,) squared gradient norms, or None.
    """

    step: int
    data_step: int
    samples: dict[str, Tensor]
    loss: Tensor
    block_squares: Tensor | None

    def is_bad(self) -> bool:
        """Return whether the loss or one of its gradients is not finite."""
        squares = self.block_squares
        return not math.isfinite(float(self.loss)) or (squares is not None and not bool(torch.isfinite(squares).all()))


class Recorder:
    """The last steps of one rank, back to the last log line at least.

    Args:
        log_every: Steps between two log lines.
    """

    def __init__(self, log_every: int) -> None:
        self.records: deque[Record] = deque(maxlen=max(STEPS_KEPT, log_every))
        self._unchecked = 0  # the newest records, of the steps since the last log line
        self.blocks: list[str] = []
        # Each watched parameter has one gradient norm for each micro-batch of this step.
        self._norms: list[list[Tensor]] = []
        # The index of each watched parameter's block is kept on the device.
        self._block_index = torch.zeros(0, dtype=torch.int64)

    def watch(self, model: nn.Module) -> None:
        """Measure the gradients of a model by hooks, before the engine reduces and frees them.

        Call it before the engine wraps the model. The norms are those of this rank's gradients, summed over its
        micro-batches.
        """
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.blocks = list(dict.fromkeys(block_of(name) for name, _ in named))
        numbers = [self.blocks.index(block_of(name)) for name, _ in named]
        self._block_index = torch.tensor(numbers, device=named[0][1].device)
        self._norms = [[] for _ in named]

        def hook(norms: list[Tensor]) -> Any:
            def add(gradient: Tensor) -> None:  # one call of torch: small models have hundreds of small gradients
                norms.append(torch.linalg.vector_norm(gradient.detach(), dtype=torch.float32))

            return add

        for norms, (_, parameter) in zip(self._norms, named, strict=True):
            parameter.register_hook(hook(norms))

    def note(self, step: int, data_step: int, drawn: Mapping[str, Batch], loss: Tensor) -> None:
        """Record a step that is over."""
        squares = self._take_squares() if self._norms else None
        self._unchecked += 1
        self.records.append(Record(step, data_step, {k: b.indices for k, b in drawn.items()}, loss, squares))

    def _take_squares(self) -> Tensor:
        """Return the squared gradient norm of each block in this step, and begin anew."""
        index = self._block_index
        unused = torch.zeros((), device=index.device)  # stands for a parameter that a micro-batch gave no gradient
        squares = torch.zeros(len(self.blocks), device=index.device)
        for of_micro_batch in zip_longest(*self._norms, fillvalue=unused):
            squares.index_add_(0, index, torch.stack(of_micro_batch).square_())
        for norms in self._norms:
            norms.clear()
        return squares

    @property
    def unchecked(self) -> list[Record]:
        """The steps since the last log line, oldest first."""
        return list(self.records)[len(self.records) - self._unchecked :]

    def mark_checked(self) -> None:
        """Call all steps up to here good."""
        self._unchecked = 0

    def losses(self) -> Tensor:
        """Return the recorded losses of this rank, (steps,) in float64 on the device."""
        return torch.stack([record.loss.double() for record in self.records])

    def forget_from(self, step: int) -> None:
        """Forget the steps that a rewind undoes, among them all that are unchecked."""
        self.records = deque((r for r in self.records if r.step < step), maxlen=self.records.maxlen)
        self._unchecked = 0

    def dump(self, path: Path) -> None:
        """Write one JSON object per step: samples, loss, gradient norm of every block."""
        lines = []
        for r in self.records:
            squares = [] if r.block_squares is None else r.block_squares.sqrt().tolist()
            row: dict[str, Any] = {"step": r.step, "data_step": r.data_step, "loss": float(r.loss)}
            row |= {"gradient_norms": dict(zip(self.blocks, squares, strict=False))}
            row |= {"samples": {k: v.tolist() for k, v in r.samples.items()}}
            lines.append(json.dumps(row) + "\n")
        replace_text(path, "".join(lines))


def block_of(name: str) -> str:
    """Return the block that a parameter belongs to: `backbone.layers.3.mixer.D` -> `backbone.layers.3`."""
    words = name.split(".")
    numbered = next((i for i, word in enumerate(words) if word.isdigit()), 0)
    return ".".join(words[: numbered + 1])
