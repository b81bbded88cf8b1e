"""Long-tailed datasets: how many samples each class keeps, and which classes are head, medium and tail."""

import math

import numpy as np
from numpy.typing import NDArray

from pipeline import seeds
from pipeline.config import choose
from pipeline.datasets.config import SplitConfig
from pipeline.errors import ConfigError

Counts = NDArray[np.int64]
_ORDER = 13  # stream of random numbers

# Semi-ViM's supplement in its own words (3.2): which share of their samples the top, the middle and the last classes
# keep, and which share of the classes are top and last. For imbalance 10 and 100 it names no borders, so we take thirds.
# For 1000 it names the top 10 and the last 100 of 1000 classes, and "a drastic drop" for the last: 1 / imbalance.
# This differs from the formula, whose middle class keeps imbalance^-0.5.
_WORDED = {
    10: ((1.0, 0.5, 0.1), (1 / 3, 1 / 3)),
    100: ((1.0, 0.2, 0.01), (1 / 3, 1 / 3)),
    1000: ((1.0, 0.1, 0.001), (0.01, 0.1)),
}


def class_ranks(available: Counts, order: str, seed: int) -> Counts:
    """Return (C,) the rank of each class, from 0 (head) to C - 1 (tail).

    Args:
        available: (C,) samples of each class.
        order: "index", "frequency" or "random".
        seed: Seed of the random order.
    """
    orders = {
        "index": lambda: np.arange(len(available)),
        "frequency": lambda: np.argsort(-available, kind="stable"),
        "random": lambda: seeds.permutation(len(available), seed, _ORDER),
    }
    return np.argsort(choose("class order", order, orders)(), kind="stable")


def target_counts(available: Counts, ranks: Counts, config: SplitConfig) -> NDArray[np.float64]:
    """Return (C,) the mean number of samples that each class keeps, at most what it has.

    Args:
        available: (C,) samples of each class.
        ranks: (C,) rank of each class, 0 = head.
        config: Imbalance, profile and n_max.
    """
    if config.imbalance == 1:
        return available.astype(np.float64)
    kept = {"exponential": _exponential, "supplement": _worded}[config.profile](ranks, config.imbalance)
    largest = available.max() if config.relative_to == "largest" else available
    return np.minimum(available, largest * kept)


def _exponential(ranks: Counts, factor: float) -> NDArray[np.float64]:
    """Return n_c / n_max = r^(−c/(C−1)), with r the imbalance and c the rank."""
    return factor ** (-ranks / max(1, len(ranks) - 1))


def _worded(ranks: Counts, factor: float) -> NDArray[np.float64]:
    (top, middle, last), (top_share, last_share) = _WORDED[int(factor)]
    num_top, num_last = max(1, round(top_share * len(ranks))), max(1, round(last_share * len(ranks)))
    return np.where(ranks < num_top, top, np.where(ranks >= len(ranks) - num_last, last, middle))


def head_counts(head: int, num_classes: int, gamma: float) -> Counts:
    """Return (C,) class sizes of USB's long-tail protocol: head x |gamma|^(-c/(C-1)), cut to whole numbers.

    The last class has head / |gamma|. With a negative gamma the order is reversed: the last class is the largest.
    """
    step = np.power(1 / abs(gamma), 1 / max(1, num_classes - 1))
    counts = [int(head * np.power(step, c)) for c in range(num_classes - 1)] + [int(head / abs(gamma))]
    return np.array(counts[::-1] if gamma < 0 else counts)


def round_count(value: float, rule: str, draw: float) -> int:
    """Round a count.

    Args:
        value: The count before rounding.
        rule: "nearest" rounds half up; "random" rounds down or up so that the mean over uniform draws is `value`.
        draw: A uniform draw from [0, 1).
    """
    return math.floor(value + 0.5) if rule == "nearest" else math.floor(value) + (draw < value - math.floor(value))


def class_groups(counts: Counts, rule: str = "thirds", k: int = 0, *, ranks: Counts | None = None) -> dict[str, Counts]:
    """Group the classes into "head", "medium" and "tail" by their number of training samples.

    Args:
        counts: (C,) training samples of each class.
        rule: "thirds" of the classes; "count" as in ImageNet-LT: more than 100, 20 to 100, fewer than 20; or "ends": the
            `k` most and the `k` least frequent.
        k: Classes at each end, for "ends".
        ranks: (C,) ranks of the split's protocol, which decide ties; then the class number decides.

    Returns:
        Sorted class numbers by the name of the group.

    Raises:
        ConfigError: The rule is unknown, or `k` is impossible.
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
    groups = (order[:first], order[first:second], order[second:])
    return {name: np.sort(group) for name, group in zip(("head", "medium", "tail"), groups, strict=True)}
