"""Accuracy from one table of counts, so that every grouping can be recomputed and every sample counts once."""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn


class LabelledBatch(Protocol):
    """Samples; an index below 0 is padding, there so that all ranks take equally many steps."""

    @property
    def images(self) -> Tensor: ...
    @property
    def labels(self) -> Tensor: ...
    @property
    def indices(self) -> Tensor: ...


@torch.no_grad()
def confusion(model: nn.Module, batches: Iterable[LabelledBatch], num_classes: int, device: torch.device) -> Tensor:
    """(C, C) counts, true class by predicted class, summed over all ranks (collective)."""
    counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
    was_training = model.training
    model.eval()
    for batch in batches:
        predicted = model(batch.images.to(device)).argmax(-1)
        real = batch.indices.to(device) >= 0
        labels = batch.labels.to(device)[real]
        counts.view(-1).index_add_(0, labels * num_classes + predicted[real], torch.ones_like(labels))
    model.train(was_training)
    return _sum_over_ranks(counts).cpu()


@torch.no_grad()
def mean_loss(
    model: nn.Module, batches: Iterable[LabelledBatch], loss: Callable[[Tensor, Tensor], Tensor], device: torch.device
) -> float:
    """Mean over samples and ranks of loss(model(images), images) -> (B,) (collective)."""
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    was_training = model.training
    model.eval()
    for batch in batches:
        images = batch.images.to(device)
        values = loss(model(images), images)[batch.indices.to(device) >= 0]
        sums += torch.stack([values.double().sum(), sums.new_tensor(len(values))])
    model.train(was_training)
    total, count = _sum_over_ranks(sums).tolist()
    return total / max(1.0, count)


def _sum_over_ranks(value: Tensor) -> Tensor:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(value)
    return value


def summary(counts: Tensor, groups: dict[str, np.ndarray]) -> dict[str, float]:
    """Accuracies in percent: top1 over samples, balanced over classes, and the mean class of each group."""
    table = counts.numpy()
    per_class = per_class_accuracy(table)
    result = {"top1": 100.0 * table.trace() / max(1, table.sum()), "balanced": float(np.nanmean(per_class))}
    for name, classes in groups.items():
        result[name] = float(np.nanmean(per_class[classes])) if len(classes) else float("nan")
    return result


def per_class_accuracy(table: np.ndarray) -> np.ndarray:
    """Percent of each class's samples that are called by their name; NaN for a class without samples."""
    total = table.sum(1)
    return np.where(total > 0, 100.0 * table.diagonal() / np.maximum(total, 1), np.nan)


def report(counts: Tensor, groups: dict[str, np.ndarray], classes: tuple[str, ...]) -> dict[str, Any]:
    """Everything about one model on one set, for evaluation.json."""
    per_class = per_class_accuracy(counts.numpy())
    return {
        **summary(counts, groups),
        "samples": int(counts.sum()),
        "groups": {name: [classes[c] for c in members] for name, members in groups.items()},
        "per_class": dict(zip(classes, (round(float(a), 4) for a in per_class), strict=True)),
        "confusion": counts.tolist(),
    }
