"""Batch memory used again: a fresh 40 MB tensor costs more in page faults than the pixels' normalisation.

A buffer is free when nothing but its pool refers to it. Tensors made from a numpy array hold a reference to it for
as long as any tensor shares the storage, so a batch that someone keeps, a view of it, or what autograd saved of it
is never written to again.
"""

import math
import sys

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_MAX_BUFFERS = 8  # beyond this somebody collects batches, and every buffer would only be searched in vain


class Buffers:
    """float32 tensors of any shape, uninitialised."""

    def __init__(self) -> None:
        self._arrays: list[NDArray[np.float32]] = []

    def take(self, shape: tuple[int, ...]) -> Tensor:
        size = math.prod(shape)
        for k in range(len(self._arrays)):
            # Two references: the list's and the argument's.
            if self._arrays[k].size == size and sys.getrefcount(self._arrays[k]) == 2:
                return torch.from_numpy(self._arrays[k]).view(shape)
        array = np.empty(size, np.float32)
        if len(self._arrays) < _MAX_BUFFERS:
            self._arrays.append(array)
        return torch.from_numpy(array).view(shape)
