"""RMS norm (Zhang and Sennrich 2019) by compiled kernels on a CPU, where torch takes a dozen passes over the tokens.

The kernels serve fp32; torch serves all other cases, and machines without a compiler.
"""

import ctypes
import functools
from ctypes import c_float, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pipeline.ops.eager import is_plain_fp32_on_cpu
from pipeline.ops.native.build import optional_library


class RMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm`, over the last dimension by the kernels where they serve. They have no second derivative."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        eps = torch.finfo(torch.float32).eps if self.eps is None else self.eps
        if self.weight is not None and _served(x, self.weight):
            return _RMSNorm.apply(x.contiguous(), self.weight.contiguous(), eps)
        return super().forward(x)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        kernels, width = _library(), len(weight)
        assert kernels is not None
        rows = x.numel() // width
        y, scale = torch.empty_like(x), x.new_empty(rows)
        kernels.rms_norm_forward(*_pointers(x, weight, y, scale), rows, width, eps)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        kernels, width = _library(), len(weight)
        assert kernels is not None
        rows = len(scale)
        g, g_x, g_weight = g.contiguous(), torch.empty_like(x), torch.empty_like(weight)
        blocks = kernels.rms_norm_blocks(rows)
        partial = x.new_empty(blocks, width)
        kernels.rms_norm_backward(*_pointers(g, x, weight, scale, g_x, partial), rows, width)
        kernels.sum_partials(*_pointers(g_weight, partial), 1, blocks, width)
        return g_x, g_weight, None


def _served(x: Tensor, weight: Tensor) -> bool:
    return (
        is_plain_fp32_on_cpu(x, weight)
        and weight.dim() == 1
        and x.shape[-1:] == weight.shape
        and x.numel() > 0
        and _library() is not None
    )


def _pointers(*tensors: Tensor) -> list[int]:
    return [t.data_ptr() for t in tensors]


@functools.cache
def _library() -> ctypes.CDLL | None:
    """Return the compiled kernels, or None where there is no compiler."""
    library = optional_library("RMS norms")
    if library is not None:
        library.rms_norm_blocks.argtypes, library.rms_norm_blocks.restype = [c_int64], c_int64
        library.rms_norm_forward.argtypes = [*[c_void_p] * 4, c_int64, c_int64, c_float]
        library.rms_norm_backward.argtypes = [*[c_void_p] * 6, c_int64, c_int64]
        library.sum_partials.argtypes = [c_void_p, c_void_p, c_int64, c_int64, c_int64]
    return library
