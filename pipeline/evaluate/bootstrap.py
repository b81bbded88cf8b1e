"""How much of a number is the luck of the test set: bootstrap intervals, and paired ones for two models.

Samples are redrawn inside each class, since a test set fixes how many images a class has. The number of right answers of
a class is then binomial, and the outcomes of two models on it are multinomial (both, the first alone, the second alone,
none), so a redraw costs a draw a class and not a draw a sample.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluate.answers import Answers

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
    first: Answers, second: Answers, num_classes: int, groups: Mapping[str, NDArray[np.int64]], seed: int = 0
) -> dict[str, Difference]:
    """Of top1, balanced and every group. Both must have answered the same samples, in the order of positions.

    Raises ValueError if they have not: there is nothing to pair.
    """
    if not np.array_equal(first.positions, second.positions) or not np.array_equal(first.labels, second.labels):
        raise ValueError("the two models were not asked the same samples")
    right = [(a.predicted == a.labels).astype(np.int64) for a in (first, second)]
    outcome = right[0] + 2 * right[1]  # 0 none, 1 the first alone, 2 the second alone, 3 both
    cells = np.bincount(first.labels * 4 + outcome, minlength=4 * num_classes).reshape(num_classes, 4)
    total = cells.sum(1)
    rng = np.random.default_rng(seed)
    shares = np.where(total[:, None] > 0, cells / np.maximum(total, 1)[:, None], 0.25)
    drawn = rng.multinomial(total, shares, (DRAWS, num_classes))  # (draws, C, 4)
    gains = drawn[..., 2] - drawn[..., 1]
    observed = cells[:, 2] - cells[:, 1]
    result = {}
    for name, w in _weights(total, groups).items():
        if w.any():
            means = 100 * gains @ w
            tail = min(np.mean(means <= 0), np.mean(means >= 0))
            result[name] = Difference(float(100 * w @ observed), *_quantiles(means), min(1.0, 2 * float(tail)))
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
