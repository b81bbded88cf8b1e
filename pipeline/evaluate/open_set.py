"""Evaluate classes that are in the test set but were never trained on, apart from the others."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

OUTSIDE = "ood"  # name of the group of classes outside the training set


def with_outside(
    groups_of_seen: Mapping[str, NDArray[np.int64]], seen: NDArray[np.int64], num_classes: int
) -> dict[str, NDArray[np.int64]]:
    """Extend groups over the seen classes to all classes.

    Args:
        groups_of_seen: Name of a group -> indices into `seen`.
        seen: Classes that were trained on.
        num_classes: Number of all classes.

    Returns:
        Name of a group -> classes, with the classes that were not seen as a group of their own (if there are any).
    """
    groups = {name: seen[indices] for name, indices in groups_of_seen.items()}
    outside = np.setdiff1d(np.arange(num_classes), seen)
    return {**groups, OUTSIDE: outside} if len(outside) else groups


def open_set(table: NDArray[np.int64], groups: Mapping[str, NDArray[np.int64]]) -> dict[str, float]:
    """Compute accuracy over the seen classes, and where the images of the other classes go.

    Args:
        table: Confusion (C, C), true class by predicted class.
        groups: Name of a group -> classes, as `with_outside` makes them.

    Returns:
        In percent: `top1_seen` and `balanced_seen` over the seen classes, and `ood_called_GROUP`, the share of the other
        classes' images that is predicted as a class of that group; and `ood_samples`, their number. Empty if every class
        was seen.
    """
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
