"""Reused batch memory: the page faults of a fresh 40 MB tensor cost more than normalising its pixels.

A buffer is free when only its pool refers to it. A tensor made from a numpy array holds a reference to the array for as
long as any tensor shares the storage. So a batch that is kept, a view of it, or what autograd saved of it is never
overwritten.
"""

import math
import sys

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_MAX_BUFFERS = 8  # more are needed only if batches are kept, and then searching the pool is in vain


class Buffers:
    """A pool of float32 tensors."""

    def __init__(self) -> None:
        self._arrays: list[NDArray[np.float32]] = []

    def take(self, shape: tuple[int, ...]) -> Tensor:
        """Return an uninitialised tensor of this shape that nothing else uses."""
        size = math.prod(shape)
        for k in range(len(self._arrays)):
            # Two references: the list's and the argument's.
            if self._arrays[k].size == size and sys.getrefcount(self._arrays[k]) == 2:
                return torch.from_numpy(self._arrays[k]).view(shape)
        array = np.empty(size, np.float32)
        if len(self._arrays) < _MAX_BUFFERS:
            self._arrays.append(array)
        return torch.from_numpy(array).view(shape)
