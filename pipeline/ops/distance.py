"""How far weights are from a teacher's: two sums in one pass over both tensors, as exact as fp32 differences allow.

In torch the same costs a temporary and three passes; on a CPU, where a teacher's update is bound by memory, that is
more than the update itself. Hence the kernel, and the torch form wherever it does not apply.
"""

import ctypes
import functools
import logging
from ctypes import POINTER, c_double, c_int64, c_void_p

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

# Elements at a time: on a CPU a chunk's difference stays in the cache, elsewhere few launches and little memory.
CHUNK, CHUNK_ELSEWHERE = 2**18, 2**24


def squared_distance_and_size(a: Tensor, b: Tensor) -> Tensor:
    """(2,) fp64: |a - b|² and |b|² of two contiguous tensors alike in shape, dtype and device. No gradient."""
    a, b = a.detach().view(-1), b.detach().view(-1)
    if a.device.type == "cpu" and a.dtype == b.dtype == torch.float32 and (kernels := _library()) is not None:
        count = a.numel()
        partial = torch.empty(2 * kernels.distance_blocks(count), dtype=torch.float64)
        out = torch.empty(2, dtype=torch.float64)
        pointers = [ctypes.cast(t.data_ptr(), POINTER(c_double)) for t in (partial, out)]
        kernels.squared_distance(a.data_ptr(), b.data_ptr(), count, *pointers)
        return out
    size = CHUNK if a.device.type == "cpu" else CHUNK_ELSEWHERE
    sums = [
        torch.stack([(x - y).double().square().sum(), y.double().square().sum()])
        for x, y in zip(a.split(size), b.split(size), strict=True)
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
    library.distance_blocks.argtypes, library.distance_blocks.restype = [c_int64], c_int64
    library.squared_distance.argtypes = [c_void_p, c_void_p, c_int64, POINTER(c_double), POINTER(c_double)]
    library.squared_distance.restype = None
    return library
