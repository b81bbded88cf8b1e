"""How much of a number is the luck of the test set: bootstrap intervals, and paired ones for two models.

Samples are redrawn inside each class, since a test set fixes how many images a class has. The number of right answers of
a class is then binomial, and what one model gains over another on them is multinomial, so a redraw costs a draw a class and not a
draw a sample.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluate.predictions import Predictions

DRAWS = 2_000
LEVEL = 0.95


class Interval(NamedTuple):
    """Percent, or points of percent for a difference."""

    value: float
    low: float
    high: float


class Difference(NamedTuple):
    """`second` minus `first` in points; `p` is twice the share of redraws on the other side of zero, at most 1."""

    value: float
    low: float
    high: float
    p: float


def intervals(
    right: NDArray[np.int64], total: NDArray[np.int64], groups: Mapping[str, NDArray[np.int64]], seed: int = 0
) -> dict[str, Interval]:
    """Of top1, balanced and every group, from the right answers (C,) and samples (C,) of each class."""
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
    """Of top1, balanced and every group: the mean gain of `second` over `first`, pair by pair (of seeds, say).

    Redrawn are the test images: alike for all pairs that were asked the same ones, separately for pairs that were asked
    others (seeds with validation parts of their own). The pairs stay as they are. Raises ValueError where the two of a pair
    have answered different samples: there is nothing to pair.
    """
    sets: dict[bytes, list[tuple[Predictions, Predictions]]] = {}
    for a, b in zip(first, second, strict=True):
        if not np.array_equal(a.sample_indices, b.sample_indices) or not np.array_equal(a.labels, b.labels):
            raise ValueError("the two models of a pair were not asked the same samples")
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
        drawn = rng.multinomial(total, odds, (DRAWS, num_classes)) @ worth  # (draws, C)
        for name, w in _weights(total, groups).items():
            if w.any():
                found.setdefault(name, []).append((n, float(w @ (cells @ worth)), drawn @ w))
    result = {}
    for name, parts in found.items():
        shares = np.array([number for number, _, _ in parts], float)
        shares /= shares.sum()
        value = float(shares @ [gained for _, gained, _ in parts])
        means = 100 * shares @ np.stack([redrawn for _, _, redrawn in parts])
        tail = min(np.mean(means <= 0), np.mean(means >= 0))
        result[name] = Difference(100 * value, *_quantiles(means), min(1.0, 2 * float(tail)))
    return result


def _weights(total: NDArray[np.int64], groups: Mapping[str, NDArray[np.int64]]) -> dict[str, NDArray[np.float64]]:
    """What one right answer of each class adds to a metric, as a share: the metric is their sum."""
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
