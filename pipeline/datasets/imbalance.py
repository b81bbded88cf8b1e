"""How many samples each class of a long-tailed dataset keeps, and which classes are head, medium and tail."""

import math

import numpy as np
from numpy.typing import NDArray

from pipeline import seeds
from pipeline.config import choose
from pipeline.datasets.config import SplitConfig
from pipeline.errors import ConfigError

Counts = NDArray[np.int64]
_ORDER = 13  # stream of random numbers

# The supplement's wording (3.2): what the top, the middle and the last classes keep, and which share of the classes
# are top and last. IF 10 and 100 name no borders: thirds. IF 1000 has the top 10 and the last 100 of 1000 classes,
# and says "a drastic drop" for these: 1 / IF. It differs from the formula, whose middle class keeps r^-0.5.
_WORDED = {
    10: ((1.0, 0.5, 0.1), (1 / 3, 1 / 3)),
    100: ((1.0, 0.2, 0.01), (1 / 3, 1 / 3)),
    1000: ((1.0, 0.1, 0.001), (0.01, 0.1)),
}


def class_ranks(available: Counts, order: str, seed: int) -> Counts:
    """(C,) the rank of each class, 0 the head and C - 1 the tail."""
    orders = {
        "index": lambda: np.arange(len(available)),
        "frequency": lambda: np.argsort(-available, kind="stable"),
        "random": lambda: seeds.permutation(len(available), seed, _ORDER),
    }
    return np.argsort(choose("class order", order, orders)(), kind="stable")


def target_counts(available: Counts, ranks: Counts, config: SplitConfig) -> NDArray[np.float64]:
    """(C,) the mean number of samples that each class keeps, at most what it has (at the head n_max)."""
    if config.imbalance == 1:
        return available.astype(np.float64)
    kept = {"exponential": _exponential, "supplement": _worded}[config.profile](ranks, config.imbalance)
    largest = available.max() if config.relative_to == "largest" else available
    return np.minimum(available, largest * kept)


def _exponential(ranks: Counts, factor: float) -> NDArray[np.float64]:
    """n_c / n_max = r^(−c/(C−1))."""
    return factor ** (-ranks / max(1, len(ranks) - 1))


def _worded(ranks: Counts, factor: float) -> NDArray[np.float64]:
    (top, middle, last), (top_share, last_share) = _WORDED[int(factor)]
    num_top, num_last = max(1, round(top_share * len(ranks))), max(1, round(last_share * len(ranks)))
    return np.where(ranks < num_top, top, np.where(ranks >= len(ranks) - num_last, last, middle))


def round_count(value: float, rule: str, draw: float) -> int:
    """To the nearest (half up), or down or up so that the mean over uniform draws is `value`."""
    return math.floor(value + 0.5) if rule == "nearest" else math.floor(value) + (draw < value - math.floor(value))


def class_groups(counts: Counts, rule: str = "thirds", k: int = 0, *, ranks: Counts | None = None) -> dict[str, Counts]:
    """Classes as "head", "medium" and "tail" by their number of training samples, (C,) `counts`.

    `rule`: "thirds" of the classes; "count", ImageNet-LT's more than 100, 20 to 100, fewer than 20; or "ends", the
    `k` most and the `k` least frequent. Ties go by the protocol's `ranks` (C,), where there are any, then by class number.
    """
    order = np.lexsort((np.arange(len(counts)), np.zeros_like(counts) if ranks is None else ranks, -counts))
    if rule == "ends" and not 0 < 2 * k <= len(counts):
        raise ConfigError(f"k = {k} classes at each end of {len(counts)}; give 1 to {len(counts) // 2}")
    third = -(-len(counts) // 3)
    borders = {
        "thirds": (third, len(counts) - third),
        "count": (int((counts > 100).sum()), int((counts >= 20).sum())),
        "ends": (k, len(counts) - k),
    }
    first, second = choose("rule for class groups", rule, borders)
    parts = (order[:first], order[first:second], order[second:])
    return {name: np.sort(part) for name, part in zip(("head", "medium", "tail"), parts, strict=True)}
