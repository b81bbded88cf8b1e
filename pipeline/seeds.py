"""Randomness as a pure function of integers: nothing to save, the same on every rank, worker and version."""

import numpy as np
from numpy.typing import NDArray

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def fold(*parts: int) -> int:
    """One 64-bit seed out of several integers (splitmix64 over the parts); order matters."""
    state = 0
    for part in parts:
        state = (state ^ (part & _MASK)) + _GOLDEN & _MASK
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state


def uniforms(count: int, *parts: int) -> NDArray[np.float64]:
    """`count` numbers in [0, 1). From raw bits: numpy promises these streams, not those of its distributions."""
    bits = np.random.PCG64(fold(*parts)).random_raw(count)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(count: int, *parts: int) -> NDArray[np.int64]:
    """A uniform permutation of range(count)."""
    return np.argsort(np.random.PCG64(fold(*parts)).random_raw(count), kind="stable")
