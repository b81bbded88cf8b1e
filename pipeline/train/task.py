"""The seam between a stage and the loop: a Task is the loss of a stage plus its companions (a teacher).

A plain object and not an nn.Module, so that nothing frozen leaks into the engine, the optimizer or a checkpoint.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pipeline.streaming.loader import Batch
    from pipeline.train.engine import Engine


class Mean(NamedTuple):
    """A mean that can be averaged further without error: averages over ranks and steps go by counts."""

    total: "Tensor"
    weight: "Tensor | float"


@dataclass(frozen=True, kw_only=True)
class StepOutput:
    """`loss`: scalar, a mean over the micro-batch.  `metrics`: name -> Mean, detached, read only when logged."""

    loss: "Tensor"
    metrics: dict[str, Mean] = field(default_factory=dict)


def mean_of(values: "Tensor", weights: "Tensor | None" = None) -> Mean:
    """The Mean of the values (B,), or of those that `weights` (B,) lets count."""
    values = values.detach().float()
    if weights is None:
        return Mean(values.sum(), float(values.numel()))
    return Mean((values * weights).sum(), weights.sum())


def probe_answer(model: "nn.Module", images: "Tensor") -> float:
    """The mean magnitude of a model's output on images (n, 3, H, W), in eval mode."""
    import torch

    was_training = model.training
    model.eval()
    with torch.no_grad():
        answer = float(model(images).float().abs().mean())
    model.train(was_training)
    return answer


class Task:
    """What differs between stages. Only `loss` must be given."""

    names_classes = True  # the model answers with logits of classes

    def loss(self, model: "nn.Module", batch: "Mapping[str, Batch]") -> StepOutput:
        """Loss and metrics of one micro-batch, stream by stream; no side effects, but for sums that `after_step` uses up."""
        raise TypeError(f"{type(self).__name__} gives no loss")

    def after_step(self, engine: "Engine", loss: "Tensor") -> dict[str, Mean]:
        """After a real optimizer step (never after a skipped one), whose loss on this rank is given: the teacher moves."""
        return {}

    def alarms(self, row: dict[str, float]) -> list[str]:
        """What a logged row of means gives to worry about, each in a sentence; alike on all ranks."""
        return []

    def probe(self, model: "nn.Module", images: "Tensor") -> float:
        """One number that the weights, of the companions too, decide: a restored run must give it again (collective)."""
        return probe_answer(model, images)

    def captions(self, model: "nn.Module", batch: "Batch") -> list[str] | None:
        """What to write over the pictures of a batch of a stream, if anything (rank 0 alone)."""
        return None

    def sharded_state(self) -> "dict[str, dict[Tensor, Tensor]]":
        """name -> {optimizer's flat parameter: a tensor of its shape}: saved and restored with the optimizer's shards."""
        return {}

    def buffers(self) -> "dict[str, Tensor]":
        """Running statistics of companions, by names that the model's do not have: saved and restored with the model's."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Small numbers, equal on all ranks."""
        return {}

    def load_state_dict(self, state: dict[str, Any], engine: "Engine") -> None:
        """Called after `sharded_state` has been restored."""
