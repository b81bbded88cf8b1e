"""Random numbers as a pure function of integers: no state to save, and equal on every rank, worker and version."""

import numpy as np
from numpy.typing import NDArray

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def fold(*integers: int) -> int:
    """Return one 64-bit seed for several integers, whose order matters (splitmix64 over them)."""
    state = 0
    for integer in integers:
        state = (state ^ (integer & _MASK)) + _GOLDEN & _MASK
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state


def uniforms(count: int, *integers: int) -> NDArray[np.float64]:
    """Return `count` random numbers in [0, 1) for the seed `fold(*integers)`.

    They are made of raw bits, because numpy promises stable raw streams, but no stable streams of its distributions.
    """
    bits = np.random.PCG64(fold(*integers)).random_raw(count)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(count: int, *integers: int) -> NDArray[np.int64]:
    """Return a uniformly random permutation of range(count) for the seed `fold(*integers)`."""
    return np.argsort(np.random.PCG64(fold(*integers)).random_raw(count), kind="stable")
