"""The distance of weights from a teacher's weights: two sums in one pass, as exact as fp32 differences allow.

torch needs a temporary tensor and three passes for the same sums. On a CPU, memory bandwidth limits a teacher's
update, so this would cost more than the update itself. A compiled kernel therefore serves fp32 on the CPU, and torch
serves all other cases.
"""

import ctypes
import functools
from collections.abc import Sequence
from ctypes import POINTER, c_double, c_int64, c_void_p

import torch
from torch import Tensor

from pipeline.ops.native.build import optional_library

# Elements at a time. On a CPU the difference of a chunk stays in the cache; a GPU wants few launches and little memory.
CHUNK, CHUNK_ELSEWHERE = 2**18, 2**24


def squared_distance_and_size(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Return the sums of |a - b|² and |b|² over all pairs as one tensor (2,) in fp64, without a gradient.

    Args:
        a: Contiguous tensors.
        b: As many contiguous tensors; each pair has one shape, dtype and device.
    """
    on_cpu = {(t.device.type, t.dtype) for t in (*a, *b)} == {("cpu", torch.float32)}
    if on_cpu and (kernels := _library()) is not None:
        pointers = [(c_void_p * len(side))(*(t.data_ptr() for t in side)) for side in (a, b)]
        counts = (c_int64 * len(a))(*(t.numel() for t in a))
        out = torch.empty(2, dtype=torch.float64)
        kernels.squared_distance(*pointers, counts, len(a), ctypes.cast(out.data_ptr(), POINTER(c_double)))
        return out
    size = CHUNK if a[0].device.type == "cpu" else CHUNK_ELSEWHERE
    sums = [
        torch.stack([(x - y).double().square().sum(), y.double().square().sum()])
        for whole, other in zip(a, b, strict=True)
        for x, y in zip(whole.detach().view(-1).split(size), other.detach().view(-1).split(size), strict=True)
    ]
    return torch.stack(sums).sum(0)


@functools.cache
def _library() -> ctypes.CDLL | None:
    """Return the compiled kernels, or None where there is no compiler."""
    library = optional_library("distances of weights")
    if library is None:
        return None
    library.squared_distance.argtypes = [POINTER(c_void_p)] * 2 + [POINTER(c_int64), c_int64, POINTER(c_double)]
    library.squared_distance.restype = None
    return library
