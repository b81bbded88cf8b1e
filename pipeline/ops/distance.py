"""How far weights are from a teacher's: two sums in one pass over both tensors, as exact as fp32 differences allow.

In torch the same costs a temporary and three passes; on a CPU, where a teacher's update is bound by memory, that is
more than the update itself. Hence the kernel, and the torch form wherever it does not apply.
"""

import ctypes
import functools
import logging
from collections.abc import Sequence
from ctypes import POINTER, c_double, c_int64, c_void_p

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

# Elements at a time: on a CPU a chunk's difference stays in the cache, elsewhere few launches and little memory.
CHUNK, CHUNK_ELSEWHERE = 2**18, 2**24


def squared_distance_and_size(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """(2,) fp64: the sums over all pairs of |a - b|² and |b|². The tensors of a pair are contiguous and alike in shape, dtype
    and device. No gradient."""
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
    """The compiled kernels, or None where there is no compiler."""
    from pipeline.ops.native.build import BuildError, load_library

    try:
        library = load_library()
    except BuildError as error:
        logger.info("distances are computed in torch: %s", error)
        return None
    library.squared_distance.argtypes = [POINTER(c_void_p)] * 2 + [POINTER(c_int64), c_int64, POINTER(c_double)]
    library.squared_distance.restype = None
    return library
