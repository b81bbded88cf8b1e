"""How good pseudo-labels are, against the truth that no loss ever sees: counts first, and every number from them."""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from pipeline.evaluate.predictions import LabelledBatch


class Labelled(Protocol):
    """Pseudo-labels (B,) and whether each counts (B,), 1 or 0."""

    @property
    def labels(self) -> Tensor: ...
    @property
    def accepted(self) -> Tensor: ...


class PseudoCounts(NamedTuple):
    total: NDArray[np.int64]  # (C,) images of each true class
    accepted: NDArray[np.int64]  # (C, C) those whose pseudo-label counts, true class by pseudo-label


@torch.no_grad()
def count_pseudo_labels(
    label: Callable[[Tensor], Labelled],
    batches: Iterable[LabelledBatch],
    num_classes: int,
    device: torch.device,
) -> PseudoCounts:
    """Counts over all ranks (collective); `label` gives images (B, 3, H, W) their pseudo-labels."""
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
    """In percent, over all classes and for each group: precision (of the labels that count, the right ones; left out where
    none counts) and coverage (of the images, those that count); and the distance of the histogram of pseudo-labels
    from that of the truth (half the sum of absolute differences of shares: 0 alike, 100 disjoint)."""
    everything = np.arange(len(counts.total))
    result = {}
    for name, classes in {"": everything, **{f"_{g}": c for g, c in groups.items()}}.items():
        # Precision of a group is by pseudo-label: how far "this is a tail class" can be trusted.
        claimed = counts.accepted[:, classes].sum()
        if claimed:
            result[f"precision{name}"] = 100.0 * counts.accepted.diagonal()[classes].sum() / claimed
        if counts.total[classes].sum():
            result[f"coverage{name}"] = 100.0 * counts.accepted[classes].sum() / counts.total[classes].sum()
    if counts.accepted.sum():
        named, true = counts.accepted.sum(0) / counts.accepted.sum(), counts.total / counts.total.sum()
        result["histogram_distance"] = 50.0 * float(np.abs(named - true).sum())
    return result
