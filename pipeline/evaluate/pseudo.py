"""Evaluate pseudo-labels against the true labels, which no loss sees: first counts, then every number from them."""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from pipeline.evaluate.predictions import LabelledBatch


class Labelled(Protocol):
    """Pseudo-labels of a batch."""

    @property
    def labels(self) -> Tensor:
        """Pseudo-labels (B,)."""

    @property
    def accepted(self) -> Tensor:
        """1 where the pseudo-label enters the loss, else 0 (B,)."""


class PseudoCounts(NamedTuple):
    """Counts of images.

    Attributes:
        total: Images of each true class (C,).
        accepted: Images whose pseudo-label is accepted (C, C), true class by pseudo-label.
    """

    total: NDArray[np.int64]
    accepted: NDArray[np.int64]


@torch.no_grad()
def count_pseudo_labels(
    label: Callable[[Tensor], Labelled],
    batches: Iterable[LabelledBatch],
    num_classes: int,
    device: torch.device,
) -> PseudoCounts:
    """Count pseudo-labels over all ranks (collective).

    Args:
        label: Gives images (B, 3, H, W) their pseudo-labels.
        batches: This rank's share; samples with a negative label are skipped.
        num_classes: Number of classes C.
        device: Where `label` computes.
    """
    counts = torch.zeros(num_classes, num_classes + 1, dtype=torch.int64, device=device)
    for batch in batches:
        pseudo = label(batch.images.to(device))
        truth = batch.labels.to(device)
        known = truth >= 0
        column = torch.where(pseudo.accepted.bool(), pseudo.labels, num_classes)[known]
        counts.view(-1).index_add_(0, truth[known] * (num_classes + 1) + column, torch.ones_like(column))
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(counts)
    table = counts.cpu().numpy()
    return PseudoCounts(table.sum(1), table[:, :-1])


def pseudo_summary(counts: PseudoCounts, groups: Mapping[str, NDArray[np.int64]]) -> dict[str, float]:
    """Summarise counts in percent, over all classes and for each group (`NAME_GROUP`).

    Returns:
        `precision`: the share of accepted pseudo-labels that is right (left out if none is accepted). `coverage`: the
        share of images whose pseudo-label is accepted. `histogram_distance`: half the sum of absolute differences between
        the class shares of pseudo-labels and of the truth; 0 = equal, 100 = disjoint.
    """
    everything = np.arange(len(counts.total))
    result = {}
    for name, classes in {"": everything, **{f"_{g}": c for g, c in groups.items()}}.items():
        # Precision of a group goes by pseudo-label: how far "this is a tail class" can be trusted.
        claimed = counts.accepted[:, classes].sum()
        if claimed:
            result[f"precision{name}"] = 100.0 * counts.accepted.diagonal()[classes].sum() / claimed
        if counts.total[classes].sum():
            result[f"coverage{name}"] = 100.0 * counts.accepted[classes].sum() / counts.total[classes].sum()
    if counts.accepted.sum():
        named, true = counts.accepted.sum(0) / counts.accepted.sum(), counts.total / counts.total.sum()
        result["histogram_distance"] = 50.0 * float(np.abs(named - true).sum())
    return result
