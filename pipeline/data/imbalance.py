"""How many samples each class of a long-tailed dataset keeps."""

import math

import numpy as np
from numpy.typing import NDArray

from pipeline.config import choose
from pipeline.data import seeds

Counts = NDArray[np.int64]
_ORDER = 13  # stream of random numbers


def class_ranks(available: Counts, order: str, seed: int) -> Counts:
    """(C,) the rank of each class, 0 the head and C - 1 the tail."""
    orders = {
        "index": lambda: np.arange(len(available)),
        "frequency": lambda: np.argsort(-available, kind="stable"),
        "random": lambda: seeds.permutation(len(available), seed, _ORDER),
    }
    return np.argsort(choose("class order", order, orders)(), kind="stable")


def target_counts(available: Counts, ranks: Counts, factor: float) -> NDArray[np.float64]:
    """n_c = n_max · r^(−c/(C−1)) with n_max the largest class, at most what a class has (spec semivim 4.2)."""
    decay = factor ** (-ranks / max(1, len(ranks) - 1))
    return np.minimum(available, available.max() * decay) if factor > 1 else available.astype(np.float64)


def round_randomly(value: float, draw: float) -> int:
    """Down or up so that the mean over uniform draws is `value`: rare classes do not all vanish."""
    return math.floor(value) + (draw < value - math.floor(value))
