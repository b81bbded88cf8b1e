"""The state of the best validation of a run, kept beside the last.

It is saved in every checkpoint as kinds of shards of its own, cut like the masters. So it is as old as the checkpoint that a run
continues from, whatever the number of processes or the ZeRO stage, and a resumed run ends with the same result.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pipeline.train.engine import Engine
    from pipeline.train.task import Task


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
