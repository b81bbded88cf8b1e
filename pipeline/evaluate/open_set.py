"""Classes that were never trained on but stand in the test set: judged apart, and where their images go."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

OUTSIDE = "ood"  # the group's name


def with_outside(
    groups_of_seen: Mapping[str, NDArray[np.int64]], seen: NDArray[np.int64], num_classes: int
) -> dict[str, NDArray[np.int64]]:
    """Groups over the classes `seen` (their places in it), as groups over all, the other classes as a group of their own."""
    groups = {name: seen[places] for name, places in groups_of_seen.items()}
    outside = np.setdiff1d(np.arange(num_classes), seen)
    return {**groups, OUTSIDE: outside} if len(outside) else groups


def open_set(table: NDArray[np.int64], groups: Mapping[str, NDArray[np.int64]]) -> dict[str, float]:
    """From the confusion (C, C), true by predicted, in percent: top1 and the mean class among the classes seen, and of the
    images of the others the shares that are called a head, medium or tail class. Empty where every class was seen."""
    if OUTSIDE not in groups:
        return {}
    outside = groups[OUTSIDE]
    seen = np.setdiff1d(np.arange(len(table)), outside)
    strangers = max(1, int(table[outside].sum()))
    called = {
        f"ood_called_{name}": 100.0 * float(table[outside][:, classes].sum()) / strangers
        for name, classes in groups.items()
        if name != OUTSIDE
    }
    right, total = table.diagonal()[seen], table[seen].sum(1)
    return {
        "top1_seen": 100.0 * float(right.sum()) / max(1, int(total.sum())),
        "balanced_seen": 100.0 * float((right[total > 0] / total[total > 0]).mean()) if total.any() else 0.0,
        "ood_samples": strangers,
        **called,
    }
