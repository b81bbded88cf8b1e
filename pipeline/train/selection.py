"""Which state of a run is its result: the last one, or the one of the best validation, which is kept beside it.

The numbers (`Selection`) are part of the loop's state. The tensors (`Best`) are saved in every checkpoint as kinds of their
own, cut like the masters. So the best state is as old as the checkpoint that a run continues from, whatever the number of
processes or the ZeRO stage, and a resumed run ends with the same result.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pipeline.train.engine import Engine
    from pipeline.train.task import Task


@dataclass(kw_only=True)
class Selection:
    """What the validations of a run have found; equal on all ranks.

    Attributes:
        step: Optimizer step of the best validation; 0 before the first.
        best: Its criteria, by name.
        last: The criteria of the newest validation.
        seen: Number of validations.
        waited: Validations since the best one.
    """

    step: int = 0
    best: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    seen: int = 0
    waited: int = 0

    def see(self, step: int, row: Mapping[str, float], criteria: Mapping[str, int]) -> bool:
        """Compare a validation with the best one; the first of two equal ones stays the best.

        Args:
            step: Optimizer steps so far.
            row: The validation's numbers.
            criteria: Names in `row`, most important first -> 1 if larger is better, -1 if smaller is.

        Returns:
            Whether it is the best so far. One that is not finite never is.
        """
        self.seen += 1
        self.last = {name: row[name] for name in criteria}
        now, before = (
            [sign * found.get(n, -sign * math.inf) for n, sign in criteria.items()] for found in (self.last, self.best)
        )
        better = all(map(math.isfinite, now)) and now > before
        self.waited = 0 if better else self.waited + 1
        if better:
            self.step, self.best = step, dict(self.last)
        return better


class Best:
    """A copy of everything that a stage exports: the masters, the teacher's tensors, and the running statistics.

    It costs 4 bytes per weight and network, sharded as the masters are, and the same in each checkpoint.

    Args:
        engine: The model under training.
        task: The task, before it holds this object.
    """

    def __init__(self, engine: "Engine", task: "Task") -> None:
        self._engine, self._task = engine, task
        self._live = {"master": {flat: flat for flat in engine.masters}, **task.sharded_state()}
        self._live_buffers = engine.buffers() | {f"task.{name}": value for name, value in task.buffers().items()}
        self._kept = {
            f"best_{kind}": {flat: value.detach().clone() for flat, value in tensors.items()}
            for kind, tensors in self._live.items()
        }
        self._kept_buffers = {f"best.{name}": value.detach().clone() for name, value in self._live_buffers.items()}

    @torch.no_grad()
    def keep(self) -> None:
        """Copy the present state."""
        for kind, tensors in self._live.items():
            for flat, value in tensors.items():
                self._kept[f"best_{kind}"][flat].copy_(value)
        for name, value in self._live_buffers.items():
            self._kept_buffers[f"best.{name}"].copy_(value)

    @torch.no_grad()
    def adopt(self) -> None:
        """Make the kept state the present one, after the last step (collective). The moments are left as they are."""
        for kind, tensors in self._live.items():
            for flat, value in tensors.items():
                value.detach().copy_(self._kept[f"best_{kind}"][flat])
        for name, value in self._live_buffers.items():
            value.copy_(self._kept_buffers[f"best.{name}"])
        self._engine.refresh_weights()
        if self._task.teacher:
            self._task.teacher.refresh()

    def sharded_state(self) -> dict[str, dict[Tensor, Tensor]]:
        """Return kind -> {master: the kept tensor of its shape}."""
        return self._kept

    def buffers(self) -> dict[str, Tensor]:
        """Return the kept running statistics."""
        return self._kept_buffers
