"""Choose which unlabelled images to label next: those that a classifier is unsure of, and that differ from one another.

Uncertainty alone chooses many copies of one hard image; diversity alone chooses easy images. So the candidates are the most
uncertain ones, and they are chosen one by one, each time the largest product of its uncertainty and its distance to the nearest
one chosen (greedy k-centre, as in the core-set method of Sener and Savarese 2018, weighted by the margin).

Shapes: n images, F features, C classes.
"""

import numpy as np
from numpy.typing import NDArray

CANDIDATES = 5  # per image to choose


def uncertainty(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return 1 minus the margin between the two most probable classes (n,): 1 = undecided, 0 = sure."""
    shares = np.exp(logits - logits.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    two = np.partition(shares, -2, axis=1)[:, -2:]
    return 1 - (two[:, 1] - two[:, 0])


def choose_uncertain(
    unsure: NDArray[np.float64], features: NDArray[np.floating], number: int, *, candidates: int = CANDIDATES
) -> NDArray[np.int64]:
    """Choose rows, the most useful first.

    Args:
        unsure: Uncertainty of each image (n,), as `uncertainty` returns it.
        features: Features of each image (n, F), in any unit.
        number: How many to choose; all if there are fewer.
        candidates: How many of the most uncertain images are considered per image to choose.

    Returns:
        The chosen rows in order, without repeats. Equal images come last, since their distance is zero.
    """
    rows = np.argsort(-unsure, kind="stable")[: max(1, candidates) * number]
    if not len(rows):
        return np.empty(0, np.int64)
    values = features[rows].astype(np.float64)
    values = (values - values.mean(0)) / np.maximum(values.std(0), 1e-12)
    weights = np.maximum(unsure[rows], 1e-12)
    chosen = [0]
    nearest = np.linalg.norm(values - values[0], axis=1)
    while len(chosen) < min(number, len(rows)):
        worth = nearest * weights
        worth[chosen] = -1.0
        chosen.append(int(worth.argmax()))
        nearest = np.minimum(nearest, np.linalg.norm(values - values[chosen[-1]], axis=1))
    return rows[chosen]
