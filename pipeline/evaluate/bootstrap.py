"""Bootstrap intervals over the test images: of one model's metrics, and of the gain of one model over another.

Samples are redrawn inside each class, since a test set fixes how many images a class has. The number of right predictions
of a class is then binomial, and the gain of one model over another is multinomial. So a redraw costs one draw per class and
not one per sample.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluate.predictions import Predictions

DRAWS = 2_000
LEVEL = 0.95


class Interval(NamedTuple):
    """A metric in percent with its bootstrap interval."""

    value: float
    low: float
    high: float


class Difference(NamedTuple):
    """`second` minus `first`, in percentage points, with its bootstrap interval.

    Attributes:
        value: The measured difference.
        low: Lower end of the interval.
        high: Upper end of the interval.
        p: Two-sided p-value: twice the share of redraws on the other side of zero, at most 1.
    """

    value: float
    low: float
    high: float
    p: float


def intervals(
    right: NDArray[np.int64], total: NDArray[np.int64], groups: Mapping[str, NDArray[np.int64]], seed: int = 0
) -> dict[str, Interval]:
    """Compute the intervals of top1, balanced and every group.

    Args:
        right: Right predictions of each class (C,).
        total: Samples of each class (C,).
        groups: Name of a group -> its classes.
        seed: Seed of the redraws.
    """
    weights = _weights(total, groups)
    rng = np.random.default_rng(seed)
    drawn = rng.binomial(total, right / np.maximum(total, 1), (DRAWS, len(total)))
    return {
        name: Interval(float(100 * w @ right), *_quantiles(100 * drawn @ w)) for name, w in weights.items() if w.any()
    }


def paired(
    first: Sequence[Predictions],
    second: Sequence[Predictions],
    num_classes: int,
    groups: Mapping[str, NDArray[np.int64]],
    seed: int = 0,
) -> dict[str, Difference]:
    """Compute the mean gain of `second` over `first` in top1, balanced and every group, pair by pair.

    Only the test images are redrawn, not the pairs. Pairs that were evaluated on the same images share a redraw. Pairs that
    were evaluated on other images (seeds with validation subsets of their own) are redrawn separately.

    Args:
        first: Predictions of one model, for example one per seed.
        second: Predictions of another model, paired with `first` by their order.
        num_classes: Number of classes C.
        groups: Name of a group -> its classes.
        seed: Seed of the redraws.

    Raises:
        ValueError: If the two models of a pair were evaluated on different samples.
    """
    sets: dict[bytes, list[tuple[Predictions, Predictions]]] = {}
    for a, b in zip(first, second, strict=True):
        if not np.array_equal(a.sample_indices, b.sample_indices) or not np.array_equal(a.labels, b.labels):
            raise ValueError("the two models of a pair were not evaluated on the same samples")
        sets.setdefault(a.sample_indices.tobytes() + a.labels.tobytes(), []).append((a, b))
    rng = np.random.default_rng(seed)
    found: dict[str, list[tuple[float, float, NDArray[np.float64]]]] = {}  # name -> pairs, gain, redrawn gains
    for pairs in sets.values():
        labels = pairs[0][0].labels
        # An image's gain, summed over n pairs, is one of -n..n: a class is redrawn as counts of these.
        n = len(pairs)
        gain = sum((b.predicted == labels).astype(np.int64) - (a.predicted == labels) for a, b in pairs)
        width = 2 * n + 1
        cells = np.bincount(labels * width + gain + n, minlength=num_classes * width).reshape(num_classes, width)
        worth = np.arange(-n, n + 1) / n
        total = cells.sum(1)
        odds = np.where(total[:, None] > 0, cells / np.maximum(total, 1)[:, None], 1 / width)
        drawn = rng.multinomial(total, odds, (DRAWS, num_classes)) @ worth  # (DRAWS, C)
        for name, w in _weights(total, groups).items():
            if w.any():
                found.setdefault(name, []).append((n, float(w @ (cells @ worth)), drawn @ w))
    result = {}
    for name, sets_of_pairs in found.items():
        shares = np.array([number for number, _, _ in sets_of_pairs], float)
        shares /= shares.sum()
        value = float(shares @ [gained for _, gained, _ in sets_of_pairs])
        means = 100 * shares @ np.stack([redrawn for _, _, redrawn in sets_of_pairs])
        tail = min(np.mean(means <= 0), np.mean(means >= 0))
        result[name] = Difference(100 * value, *_quantiles(means), min(1.0, 2 * float(tail)))
    return result


def _weights(total: NDArray[np.int64], groups: Mapping[str, NDArray[np.int64]]) -> dict[str, NDArray[np.float64]]:
    """Return how much one right prediction of each class adds to each metric; the metric is the sum."""
    per_class = np.where(total > 0, 1 / np.maximum(total, 1), 0.0)
    known = total > 0
    weights = {"top1": known / max(1, total.sum()), "balanced": per_class / max(1, known.sum())}
    for name, classes in groups.items():
        inside = np.zeros(len(total))
        inside[classes] = per_class[classes]
        weights[name] = inside / max(1, known[classes].sum())
    return weights


def _quantiles(values: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
