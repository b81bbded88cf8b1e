"""The seam between a stage and the loop: a Task is the loss of a stage, with the teacher that it may hold.

A Task is a plain object and not an nn.Module, so that nothing frozen leaks into the engine, the optimizer or a checkpoint.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pipeline.streaming.loader import Batch


class Mean(NamedTuple):
    """A mean that can be averaged further without error: averages over ranks and steps go by counts."""

    total: "Tensor"
    weight: "Tensor | float"


@dataclass(frozen=True, kw_only=True)
class StepOutput:
    """What a loss returns.

    Args:
        loss: Scalar, a mean over the micro-batch.
        metrics: Named means, detached; they are read only when they are logged.
    """

    loss: "Tensor"
    metrics: dict[str, Mean] = field(default_factory=dict)


def mean_of(values: "Tensor", weights: "Tensor | None" = None) -> Mean:
    """Return the Mean of `values` (B,), each counted by its weight in `weights` (B,) if those are given."""
    values = values.detach().float()
    if weights is None:
        return Mean(values.sum(), float(values.numel()))
    return Mean((values * weights).sum(), weights.sum())


def mean_magnitude(model: "nn.Module", images: "Tensor") -> float:
    """Return the mean magnitude of a model's output on images (n, 3, H, W), in eval mode."""
    import torch

    was_training = model.training
    model.eval()
    with torch.no_grad():
        magnitude = float(model(images).float().abs().mean())
    model.train(was_training)
    return magnitude


class Companion(Protocol):
    """What a Task asks of its teacher; `pipeline.ssl.teacher.Teacher` is the one there is."""

    def lr_factor(self) -> float:
        """Return what the last step's learning rate was multiplied by."""

    def after_step(self, loss: "Tensor") -> dict[str, Mean]:
        """Move after an optimizer step (collective)."""

    def fingerprint(self, images: "Tensor") -> float:
        """Return one number that the teacher's weights decide (collective)."""

    def refresh(self) -> None:
        """Bring what computes up to date with the sharded state (collective)."""

    def sharded_state(self) -> "dict[Tensor, Tensor]":
        """Return {optimizer's flat parameter: the teacher's tensor of its shape}."""

    def buffers(self) -> "dict[str, Tensor]":
        """Return the running statistics that are a state of the teacher's own."""

    def state_dict(self) -> dict[str, Any]:
        """Return small numbers, equal on all ranks."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the small numbers, after the sharded state."""


class KeptState(Protocol):
    """What a Task asks of the best state that it holds; `pipeline.train.best.Best` is the one there is."""

    def keep(self) -> None:
        """Copy the present state."""

    def adopt(self) -> None:
        """Make the kept state the present one (collective)."""

    def sharded_state(self) -> "dict[str, dict[Tensor, Tensor]]":
        """Return kind -> {optimizer's flat parameter: the kept tensor of its shape}."""

    def buffers(self) -> "dict[str, Tensor]":
        """Return the kept running statistics."""


class Task:
    """What differs between stages. Only `loss` must be given.

    A teacher that the Task holds is moved, saved, restored and fingerprinted here, so no stage repeats it. The best state is
    saved and restored here too.

    Attributes:
        names_classes: Whether the model's outputs are logits of classes.
        teacher: The average of the weights, if the stage has one.
        best: The state of the best validation, if `loop.select` asks for it.
        exported: The network that the stage exports, by its name in a validation.
    """

    names_classes = True
    teacher: Companion | None = None
    best: KeptState | None = None
    exported: str = "student"

    def loss(self, model: "nn.Module", batch: "Mapping[str, Batch]") -> StepOutput:
        """Return loss and metrics of one micro-batch of every stream.

        A loss has no side effects, except for sums that `after_step` uses up.
        """
        raise TypeError(f"{type(self).__name__} gives no loss")

    def lr_factor(self) -> float:
        """Return what the last step's learning rate was multiplied by, for the log: it may wait for the device."""
        return self.teacher.lr_factor() if self.teacher else 1.0

    def after_step(self, loss: "Tensor") -> dict[str, Mean]:
        """Move the teacher after a real optimizer step, never after a skipped one.

        Args:
            loss: The step's loss on this rank, a scalar.

        Returns:
            Metrics of the move.
        """
        return self.teacher.after_step(loss) if self.teacher else {}

    def alarms(self, row: dict[str, float]) -> list[str]:
        """Return what is alarming about a logged row of means, one sentence each; equal on all ranks."""
        return []

    def criteria(self) -> dict[str, int]:
        """Return by which numbers of a validation the stage's result is chosen: name -> 1 (larger is better) or -1."""
        prefix = "val/" if self.exported == "student" else f"val/{self.exported}_"
        return {f"{prefix}top1": 1, f"{prefix}nll": -1}

    def fingerprint(self, model: "nn.Module", images: "Tensor") -> float:
        """Return one number that the weights, the teacher's too, decide: a restored run must reproduce it (collective)."""
        return mean_magnitude(model, images) + (self.teacher.fingerprint(images) if self.teacher else 0.0)

    def captions(self, model: "nn.Module", batch: "Batch") -> list[str] | None:
        """Return what to write over the pictures of a stream's batch, if anything (rank 0 only)."""
        return None

    def sharded_state(self) -> "dict[str, dict[Tensor, Tensor]]":
        """Return name -> {optimizer's flat parameter: a tensor of its shape}; saved with the optimizer's shards."""
        teacher = {"teacher": self.teacher.sharded_state()} if self.teacher else {}
        return teacher | (self.best.sharded_state() if self.best else {})

    def buffers(self) -> "dict[str, Tensor]":
        """Return running statistics beside the model's: the teacher's and the best state's; rank 0 saves them."""
        return (self.teacher.buffers() if self.teacher else {}) | (self.best.buffers() if self.best else {})

    def state_dict(self) -> dict[str, Any]:
        """Return small numbers, equal on all ranks."""
        return {"teacher": self.teacher.state_dict()} if self.teacher else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; called after `sharded_state` has been restored."""
        if self.teacher:
            self.teacher.load_state_dict(state["teacher"])
