"""The compiled scan, convolution and projections as functions on tensors: an implementation of `pipeline.ops.kernels.Kernels`.

torch allocates the memory, and ctypes passes pointers and strides. Tensors are fp32 or bf16, each with its own dtype
and strides; A, D, biases and convolution weights are contiguous fp32. An output has the memory layout of its input:
channels last (as between the matrix products of a mixer), else steps last. Sums over units of work are taken in a
fixed order, so results do not depend on the number of threads. Nothing in this file knows autograd.
"""

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from pipeline.ops.kernels import Filter, Projections, ScanInputs, ScanProblem
from pipeline.ops.native.build import best_simd, load_library
from pipeline.ops.projections import TorchProjections


class Strided(Structure):
    """tiles.h: a tensor (batch, group, channel, step)."""

    _fields_ = [("data", c_void_p), *((name, c_int64) for name in ("batch", "group", "channel", "step", "bf16"))]


class _ScanDirection(Structure):
    """scan.cpp: Direction."""

    _fields_ = [
        *((name, Strided) for name in ("u", "delta", "B", "C", "z", "o", "p", "g_o", "g_p", "g_u", "g_delta", "g_z")),
        *((name, c_void_p) for name in ("A", "D", "bias", "blend", "carries")),
        *((name, c_void_p) for name in ("partial_A", "partial_D", "partial_bias", "partial_BC")),
        ("reversed", c_int64),
    ]


class _ScanCall(Structure):
    """scan.cpp: Scan."""

    _fields_ = [
        *((name, c_int64) for name in ("batch", "groups", "channels", "states", "steps", "softplus", "directions")),
        ("direction", _ScanDirection * 2),
    ]


class _ConvDirection(Structure):
    """conv.cpp: ConvDirection."""

    _fields_ = [
        *((name, Strided) for name in ("x", "o", "g_o", "g_x")),
        *((name, c_void_p) for name in ("weight", "bias", "partial_weight", "partial_bias")),
    ]


class _ConvCall(Structure):
    """conv.cpp: Conv."""

    _fields_ = [
        *((name, c_int64) for name in ("batch", "channels", "taps", "steps", "directions")),
        ("direction", _ConvDirection * 2),
    ]


class _ProjectionsCall(Structure):
    """projections.cpp: Projections."""

    _fields_ = [
        *((name, c_int64) for name in ("rows", "channels", "rank", "width")),
        *((name, c_void_p) for name in ("x_proj", "dt_proj", "u", "projected", "delta")),
        *((name, c_void_p) for name in ("g_delta", "g_projected", "g_u", "g_x_proj", "g_dt_proj")),
    ]


def _strided(tensor: Tensor | None, reverse: bool) -> Strided:
    if tensor is None:
        return Strided()
    strides = tensor.stride() if tensor.dim() == 4 else (tensor.stride(0), 0, tensor.stride(1), tensor.stride(2))
    data, step = tensor.data_ptr(), strides[3]
    if reverse:  # from the last step to the first
        data += (tensor.shape[-1] - 1) * step * tensor.element_size()
        step = -step
    return Strided(data, *strides[:3], step, tensor.dtype == torch.bfloat16)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _floats(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32)


class Library(TorchProjections):
    """The loaded library with its argument types declared.

    Args:
        simd: The instruction set, a key of `build.SIMD`; by default the widest that this processor runs.
        cache: The folder of built libraries; by default the user's.

    Raises:
        BuildError: If there is no compiler, or it fails.
    """

    fuses_convolution = False  # the caches are large enough for u

    def __init__(self, simd: str | None = None, cache: Path | None = None) -> None:
        self._lib = load_library(simd, cache)
        self._wide = (simd or best_simd()) != "baseline"  # with 4 lanes torch's products are faster than ours
        sizes_of_a_call = ("scan_carry_floats", "scan_blocks", "scan_width", "scan_state_block")
        for name in ("scan_struct_bytes", "conv_struct_bytes", "projections_struct_bytes", *sizes_of_a_call):
            getattr(self._lib, name).restype = c_int64
        for name in (*sizes_of_a_call, "scan_forward", "scan_backward"):
            getattr(self._lib, name).argtypes = [POINTER(_ScanCall)]
        for name in ("conv_forward", "conv_backward"):
            getattr(self._lib, name).argtypes = [POINTER(_ConvCall)]
        for name in ("projections_forward", "projections_backward"):
            getattr(self._lib, name).argtypes = [POINTER(_ProjectionsCall)]
        self._lib.sum_partials.argtypes = [c_void_p, c_void_p, c_int64, c_int64, c_int64]
        sizes = self._lib.scan_struct_bytes(), self._lib.conv_struct_bytes(), self._lib.projections_struct_bytes()
        assert sizes == tuple(map(ctypes.sizeof, (_ScanCall, _ConvCall, _ProjectionsCall))), (
            "the structures here and in C++ differ"
        )

    def scan_forward(
        self, problem: ScanProblem, *, ungated: bool, keep: bool
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Implement `Kernels.scan_forward`."""
        call = _scan_call(problem)
        inputs, reverses = problem.inputs, problem.reverses
        o = torch.empty_like(inputs[0].u)
        ps = [torch.empty_like(o) for _ in inputs if ungated]
        carries = [_floats(self._lib.scan_carry_floats(call)) for _ in inputs if keep]
        for k, reverse in enumerate(reverses):
            direction = call.direction[k]
            direction.o = _strided(o, reverse)
            direction.p = _strided(ps[k] if ungated else None, reverse)
            direction.carries = _pointer(carries[k] if keep else None)
        self._lib.scan_forward(call)
        return o, ps, carries

    def scan_backward(
        self,
        problem: ScanProblem,
        carries: Sequence[Tensor],
        g_o: Tensor,
        g_ps: Sequence[Tensor],
        g_z: Tensor | None,
    ) -> list[ScanInputs]:
        """Implement `Kernels.scan_backward`."""
        call = _scan_call(problem)
        inputs, reverses = problem.inputs, problem.reverses
        (batch, channels, steps), states = inputs[0].u.shape, inputs[0].A.shape[1]
        outer, blocks = batch * call.groups, self._lib.scan_blocks(call)
        width, block = self._lib.scan_width(call), self._lib.scan_state_block(call)
        grads, partials = [], []
        for k, reverse in enumerate(reverses):
            g_u, g_delta = torch.empty_like(inputs[k].u), torch.empty_like(inputs[k].delta)
            partial_A, partial_D, partial_bias = (_floats(1, batch, channels * n) for n in (states, 1, 1))
            partial_BC = _floats(outer, blocks, steps * 2 * width)
            direction = call.direction[k]
            direction.g_o, direction.g_z = _strided(g_o, reverse), _strided(g_z, reverse)
            direction.g_p = _strided(g_ps[k] if g_ps else None, reverse)
            direction.g_u, direction.g_delta = _strided(g_u, reverse), _strided(g_delta, reverse)
            direction.carries = carries[k].data_ptr()
            direction.partial_A, direction.partial_D, direction.partial_bias = map(
                _pointer, (partial_A, partial_D, partial_bias)
            )
            direction.partial_BC = partial_BC.data_ptr()
            grads.append((g_u, g_delta))
            partials.append((partial_A, partial_BC, partial_D, partial_bias))
        self._lib.scan_backward(call)

        results = []
        for given, (g_u, g_delta), (partial_A, partial_BC, partial_D, partial_bias) in zip(
            inputs, grads, partials, strict=True
        ):
            sums = self._sum(partial_BC).view(batch, call.groups, steps, width // block, 2, block)
            g_B, g_C = (
                sums[..., k, :].flatten(3)[..., :states].transpose(2, 3).reshape(given.B.shape) for k in range(2)
            )
            g_D = None if given.D is None else self._sum(partial_D)[0]
            g_bias = None if given.bias is None else self._sum(partial_bias)[0]
            g_A = self._sum(partial_A).view(channels, states)
            results.append(ScanInputs(g_u, g_delta, g_A, g_B, g_C, g_D, g_bias))
        return results

    def conv_forward(self, x: Tensor, filters: Sequence[Filter], reverses: Sequence[bool]) -> list[Tensor]:
        """Implement `Kernels.conv_forward`."""
        call = _conv_call(x, filters, reverses)
        outs = [torch.empty_like(x) for _ in filters]
        for k, reverse in enumerate(reverses):
            call.direction[k].o = _strided(outs[k], reverse)
        self._lib.conv_forward(call)
        return outs

    def conv_backward(
        self,
        x: Tensor,
        filters: Sequence[Filter],
        reverses: Sequence[bool],
        g_outs: Sequence[Tensor],
        g_x: Tensor,
    ) -> list[Filter]:
        """Implement `Kernels.conv_backward`."""
        call = _conv_call(x, filters, reverses)
        partials = []
        for k, reverse in enumerate(reverses):
            partial_weight = _floats(1, x.shape[0], x.shape[1] * call.taps)
            partial_bias = _floats(1, x.shape[0], x.shape[1])
            direction = call.direction[k]
            direction.g_o, direction.g_x = _strided(g_outs[k], reverse), _strided(g_x, reverse)
            direction.partial_weight, direction.partial_bias = partial_weight.data_ptr(), partial_bias.data_ptr()
            partials.append((partial_weight, partial_bias))
        self._lib.conv_backward(call)
        return [
            (self._sum(partial_weight).view(weight.shape), None if bias is None else self._sum(partial_bias)[0])
            for (weight, bias), (partial_weight, partial_bias) in zip(filters, partials, strict=True)
        ]

    def project(self, u: Tensor, x_proj: Tensor, dt_proj: Tensor) -> tuple[Tensor, Tensor]:
        """Implement `Kernels.project`."""
        if not self._projects(u, x_proj, dt_proj):
            return super().project(u, x_proj, dt_proj)
        projected, delta = u.new_empty(*u.shape[:-1], len(x_proj)), torch.empty_like(u)
        tensors = {"x_proj": x_proj, "dt_proj": dt_proj, "u": u, "projected": projected, "delta": delta}
        self._lib.projections_forward(_projections_call(tensors))
        return projected, delta

    def project_backward(
        self, given: Projections, g_delta: Tensor, g_projected: Tensor, g_u: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Implement `Kernels.project_backward`."""
        if not self._projects(*given, g_delta, g_projected, g_u):
            return super().project_backward(given, g_delta, g_projected, g_u)
        g_x_proj, g_dt_proj = torch.empty_like(given.x_proj), torch.empty_like(given.dt_proj)
        tensors = {"g_delta": g_delta, "g_projected": g_projected, "g_u": g_u}
        tensors |= {"g_x_proj": g_x_proj, "g_dt_proj": g_dt_proj}
        self._lib.projections_backward(_projections_call(given._asdict() | tensors))
        return g_x_proj, g_dt_proj

    def _projects(self, *tensors: Tensor) -> bool:
        """Return whether the kernels compute the projections of these tensors: fp32 without gaps, and not empty."""
        return (
            self._wide
            and tensors[0].numel() > 0
            and all(t.dtype == torch.float32 and t.is_contiguous() for t in tensors)
        )

    def _sum(self, partials: Tensor) -> Tensor:
        """Sum (outer, partial sums, size) over the partial sums, in their order."""
        outer, count, size = partials.shape
        out = _floats(outer, size)
        self._lib.sum_partials(out.data_ptr(), partials.data_ptr(), outer, count, size)
        return out


def _scan_call(problem: ScanProblem) -> _ScanCall:
    inputs = problem.inputs
    first = inputs[0]
    groups = first.B.shape[1] if first.B.dim() == 4 else 1
    batch, channels, steps = first.u.shape
    call = _ScanCall(batch, groups, channels, first.A.shape[1], steps, problem.softplus, len(inputs))
    for k, (given, reverse) in enumerate(zip(inputs, problem.reverses, strict=True)):
        direction = call.direction[k]
        direction.u, direction.delta = _strided(given.u, reverse), _strided(given.delta, reverse)
        direction.B, direction.C = _strided(given.B, reverse), _strided(given.C, reverse)
        direction.z = _strided(problem.z, reverse)
        direction.A, direction.D, direction.bias = map(_pointer, (given.A, given.D, given.bias))
        direction.blend = _pointer(None if problem.blend is None else problem.blend[k])
        direction.reversed = reverse
    return call


def _projections_call(tensors: dict[str, Tensor]) -> _ProjectionsCall:
    """Return the call whose fields have the names of the tensors; those without a tensor are null."""
    u, (channels, rank) = tensors["u"], tensors["dt_proj"].shape
    pointers = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    return _ProjectionsCall(u.numel() // channels, channels, rank, len(tensors["x_proj"]), **pointers)


def _conv_call(x: Tensor, filters: Sequence[Filter], reverses: Sequence[bool]) -> _ConvCall:
    call = _ConvCall(x.shape[0], x.shape[1], filters[0][0].shape[2], x.shape[2], len(filters))
    for k, ((weight, bias), reverse) in enumerate(zip(filters, reverses, strict=True)):
        direction = call.direction[k]
        direction.x = _strided(x, reverse)
        direction.weight, direction.bias = _pointer(weight), _pointer(bias)
    return call
