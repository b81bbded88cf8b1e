"""The native kernels as differentiable operators: memory comes from torch, pointers and strides go through ctypes.

fp32 and bf16 run as they are, each tensor in its own dtype and with its own strides; other dtypes are converted.
Outputs follow u's layout: channels last in memory if u is (what a mixer has between its matrix products), else steps
last. Gradients are written by one call each; sums over units are taken in a fixed order, so nothing depends on the
number of threads.
"""

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.ops.native.build import load_library


class Strided(Structure):
    """tiles.h: a tensor (batch, group, channel, step)."""

    _fields_ = [("data", c_void_p), *((name, c_int64) for name in ("batch", "group", "channel", "step", "bf16"))]


class ScanDirection(Structure):
    """scan.cpp: Direction."""

    _fields_ = [
        *((name, Strided) for name in "u delta B C z o p g_o g_p g_u g_delta g_z".split()),
        *((name, c_void_p) for name in "A D bias carries part_A part_D part_bias part_B part_C".split()),
        ("reversed", c_int64),
    ]


class ScanCall(Structure):
    """scan.cpp: Scan."""

    _fields_ = [
        *((name, c_int64) for name in "batch groups channels states steps softplus directions".split()),
        ("direction", ScanDirection * 2),
    ]


class ConvDirection(Structure):
    """conv.cpp: ConvDirection."""

    _fields_ = [
        *((name, Strided) for name in "x o g_o g_x".split()),
        *((name, c_void_p) for name in "weight bias part_weight part_bias".split()),
    ]


class ConvCall(Structure):
    """conv.cpp: Conv."""

    _fields_ = [
        *((name, c_int64) for name in "batch channels taps steps directions".split()),
        ("direction", ConvDirection * 2),
    ]


def strided(tensor: Tensor | None, reverse: bool) -> Strided:
    """A (Bt, E, L), (Bt, N, L) or (Bt, G, N, L) tensor; `reverse` lets the kernel walk from the last step to the first."""
    if tensor is None:
        return Strided()
    strides = tensor.stride() if tensor.dim() == 4 else (tensor.stride(0), 0, tensor.stride(1), tensor.stride(2))
    data, step = tensor.data_ptr(), strides[3]
    if reverse:
        data += (tensor.shape[-1] - 1) * step * tensor.element_size()
        step = -step
    return Strided(data, *strides[:3], step, tensor.dtype == torch.bfloat16)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _loadable(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or tensor.dtype in (torch.float32, torch.bfloat16) else tensor.float()


def _plain(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float().contiguous()


class Kernels:
    """The loaded library with its argument types declared."""

    def __init__(self, simd: str | None = None) -> None:
        self.library = load_library(simd)
        for name in ("scan_struct_bytes", "conv_struct_bytes", "scan_carry_floats", "scan_blocks", "scan_width"):
            getattr(self.library, name).restype = c_int64
        for name in ("scan_carry_floats", "scan_blocks", "scan_width", "scan_forward", "scan_backward"):
            getattr(self.library, name).argtypes = [POINTER(ScanCall)]
        for name in ("conv_forward", "conv_backward"):
            getattr(self.library, name).argtypes = [POINTER(ConvCall)]
        self.library.sum_parts.argtypes = [c_void_p, c_void_p, c_int64, c_int64, c_int64]
        sizes = self.library.scan_struct_bytes(), self.library.conv_struct_bytes()
        assert sizes == (ctypes.sizeof(ScanCall), ctypes.sizeof(ConvCall)), "the structures here and in C++ differ"

    def sum_parts(self, parts: Tensor, outer: int) -> Tensor:
        """(outer, parts, ...) fp32 summed over the parts, in their order: (outer, ...)."""
        out = parts.new_empty(outer, *parts.shape[2:])
        self.library.sum_parts(out.data_ptr(), parts.data_ptr(), outer, parts.shape[1], out[0].numel() if outer else 0)
        return out

    def scan(
        self,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        z: Tensor | None = None,
        delta_bias: Tensor | None = None,
        *,
        delta_softplus: bool = True,
        reverse: bool = False,
        return_ungated: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """`pipeline.ops.scan.selective_scan`."""
        results = _Scan.apply(self, delta_softplus, (reverse,), return_ungated, z, u, delta, A, B, C, D, delta_bias)
        return results if return_ungated else results[0]

    def conv(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, reverse: bool = False) -> Tensor:
        """`pipeline.ops.scan.causal_conv1d_silu`."""
        return _Conv.apply(self, (reverse,), x, weight, bias)[0]


class _Scan(torch.autograd.Function):
    """One or two directions with a common gate: (o, p of each direction if `ungated`)."""

    @staticmethod
    def forward(
        ctx: Any,
        kernels: Kernels,
        softplus: bool,
        reverses: tuple[bool, ...],
        ungated: bool,
        z: Tensor | None,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """`tensors`: u, delta, A, B, C, D, delta_bias of each direction."""
        ctx.kernels, ctx.softplus, ctx.reverses, ctx.ungated = kernels, softplus, reverses, ungated
        ctx.dtypes = [None if t is None else t.dtype for t in (z, *tensors)]
        ready = [_loadable(z)]
        for u, delta, A, B, C, D, bias in zip(*[iter(tensors)] * 7, strict=True):
            ready += [_loadable(u), _loadable(delta), _plain(A), _loadable(B), _loadable(C), _plain(D), _plain(bias)]
        u = ready[1]
        o = torch.empty_like(u)
        ps = [torch.empty_like(u) for _ in reverses] if ungated else [None] * len(reverses)
        call = _scan_call(ctx, ready)
        carries = []
        for direction, reverse, p in zip(call.direction, reverses, ps, strict=False):
            direction.o, direction.p = strided(o, reverse), strided(p, reverse)
            if any(ctx.needs_input_grad):
                size = kernels.library.scan_carry_floats(call)
                carries.append(torch.empty(size, dtype=torch.float32))
                direction.carries = _pointer(carries[-1])
        kernels.library.scan_forward(call)
        ctx.save_for_backward(*ready, *carries)
        return tuple(t.to(ctx.dtypes[1]) for t in (o, *ps) if t is not None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_o: Tensor, *g_ps: Tensor) -> tuple[Any, ...]:
        kernels, count = ctx.kernels, len(ctx.reverses)
        saved = ctx.saved_tensors
        ready, carries = saved[: 1 + 7 * count], saved[1 + 7 * count :]
        call = _scan_call(ctx, ready)
        batch, groups, channels, states, steps = (getattr(call, name) for name, _ in ScanCall._fields_[:5])
        g_o = _loadable(g_o)
        g_z = None if ready[0] is None else torch.empty_like(ready[0])
        blocks, width = kernels.library.scan_blocks(call), kernels.library.scan_width(call)
        grads: list[Tensor | None] = [g_z]
        held = []
        for k, reverse in enumerate(ctx.reverses):
            u, delta, _, B, C, D, bias = ready[1 + 7 * k : 8 + 7 * k]
            g_u, g_delta = torch.empty_like(u), torch.empty_like(delta)
            g_p = _loadable(g_ps[k]) if ctx.ungated else None
            part_A, part_D, part_bias = (
                u.new_empty(1, batch, channels * n, dtype=torch.float32) for n in (states, 1, 1)
            )
            part_B, part_C = (u.new_empty(batch * groups, blocks, steps * width, dtype=torch.float32) for _ in range(2))
            direction = call.direction[k]
            direction.g_o, direction.g_p, direction.g_z = (strided(t, reverse) for t in (g_o, g_p, g_z))
            direction.g_u, direction.g_delta = strided(g_u, reverse), strided(g_delta, reverse)
            direction.carries = _pointer(carries[k])
            direction.part_A, direction.part_D, direction.part_bias = map(_pointer, (part_A, part_D, part_bias))
            direction.part_B, direction.part_C = _pointer(part_B), _pointer(part_C)
            held.append((g_p, B, C, D, bias, part_A, part_D, part_bias, part_B, part_C))
            grads += [g_u, g_delta]
        kernels.library.scan_backward(call)

        results: list[Tensor | None] = [g_z]
        for k, (_, B, C, D, bias, part_A, part_D, part_bias, part_B, part_C) in enumerate(held):
            g_A = kernels.sum_parts(part_A, 1).view(channels, states)
            g_B, g_C = (
                kernels.sum_parts(part, batch * groups).view(batch, groups, steps, width)[..., :states].transpose(2, 3)
                for part in (part_B, part_C)
            )
            g_D = None if D is None else kernels.sum_parts(part_D, 1)[0]
            g_bias = None if bias is None else kernels.sum_parts(part_bias, 1)[0]
            results += [
                grads[1 + 2 * k],
                grads[2 + 2 * k],
                g_A,
                g_B.reshape(B.shape),
                g_C.reshape(C.shape),
                g_D,
                g_bias,
            ]
        typed = [None if g is None else g.to(dtype) for g, dtype in zip(results, ctx.dtypes, strict=True)]
        return (None, None, None, None, *typed)


def _scan_call(ctx: Any, ready: Sequence[Tensor | None]) -> ScanCall:
    z, u, _, A, B = ready[:5]
    groups = B.shape[1] if B.dim() == 4 else 1
    call = ScanCall(u.shape[0], groups, u.shape[1], A.shape[1], u.shape[2], ctx.softplus, len(ctx.reverses))
    for k, reverse in enumerate(ctx.reverses):
        u, delta, A, B, C, D, bias = ready[1 + 7 * k : 8 + 7 * k]
        direction = call.direction[k]
        direction.u, direction.delta = strided(u, reverse), strided(delta, reverse)
        direction.B, direction.C, direction.z = strided(B, reverse), strided(C, reverse), strided(z, reverse)
        direction.A, direction.D, direction.bias = _pointer(A), _pointer(D), _pointer(bias)
        direction.reversed = reverse
    return call


class _Conv(torch.autograd.Function):
    """One or two directions over the same x: SiLU(conv) of each."""

    @staticmethod
    def forward(
        ctx: Any, kernels: Kernels, reverses: tuple[bool, ...], x: Tensor, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        """`tensors`: weight and bias of each direction."""
        ctx.kernels, ctx.reverses = kernels, reverses
        ctx.dtypes = [None if t is None else t.dtype for t in (x, *tensors)]
        ready = [_loadable(x), *map(_plain, tensors)]
        call = _conv_call(ctx, ready)
        outs = [torch.empty_like(ready[0]) for _ in reverses]
        for direction, reverse, out in zip(call.direction, reverses, outs, strict=False):
            direction.o = strided(out, reverse)
        kernels.library.conv_forward(call)
        ctx.save_for_backward(*ready)
        return tuple(out.to(x.dtype) for out in outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *g_outs: Tensor) -> tuple[Any, ...]:
        kernels, ready = ctx.kernels, ctx.saved_tensors
        call = _conv_call(ctx, ready)
        x = ready[0]
        g_x = torch.empty_like(x)
        g_outs = tuple(_loadable(g) for g in g_outs)
        held = []
        for k, reverse in enumerate(ctx.reverses):
            part_weight = x.new_empty(1, x.shape[0], x.shape[1] * call.taps, dtype=torch.float32)
            part_bias = x.new_empty(1, x.shape[0], x.shape[1], dtype=torch.float32)
            direction = call.direction[k]
            direction.g_o, direction.g_x = strided(g_outs[k], reverse), strided(g_x, reverse)
            direction.part_weight, direction.part_bias = _pointer(part_weight), _pointer(part_bias)
            held.append((part_weight, part_bias))
        kernels.library.conv_backward(call)
        results: list[Tensor | None] = [g_x]
        for (part_weight, part_bias), weight, bias in zip(held, ready[1::2], ready[2::2], strict=True):
            results.append(kernels.sum_parts(part_weight, 1).view(weight.shape))
            results.append(None if bias is None else kernels.sum_parts(part_bias, 1)[0])
        typed = [None if g is None else g.to(dtype) for g, dtype in zip(results, ctx.dtypes, strict=True)]
        return (None, None, *typed)


def _conv_call(ctx: Any, ready: Sequence[Tensor | None]) -> ConvCall:
    x = ready[0]
    call = ConvCall(x.shape[0], x.shape[1], ready[1].shape[2], x.shape[2], len(ctx.reverses))
    for k, reverse in enumerate(ctx.reverses):
        direction = call.direction[k]
        direction.x = strided(x, reverse)
        direction.weight, direction.bias = _pointer(ready[1 + 2 * k]), _pointer(ready[2 + 2 * k])
    return call
