"""The Triton kernels as a `pipeline.ops.kernels.Kernels`: launches, memory, and the sums over partial results.

It needs a CUDA device or Triton's interpreter; the tests use the interpreter where there is no GPU. The convolution is
torch's own, because cuDNN's depthwise kernels are no bottleneck on a GPU.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.ops import reference
from pipeline.ops.kernels import Filter, ScanInputs, ScanProblem
from pipeline.ops.triton_kernels import View, Way, compiled

BLOCK_CHANNELS, CHUNK_STEPS, WARPS = 16, 16, 8  # the widest block whose backward spills few registers on sm_90


def _view(tensor: Tensor) -> View:
    if tensor.dim() == 4:
        return View(tensor, *tensor.stride())
    return View(tensor, tensor.stride(0), 0, tensor.stride(1), tensor.stride(2))


def _view_or_none(tensor: Tensor | None) -> View | None:
    return None if tensor is None else _view(tensor)


class TritonLibrary:
    """The Triton kernels. Sums over channels run per block and then in a fixed order: the backward is deterministic."""

    def __init__(self) -> None:
        self._forward, self._backward = compiled()

    def scan_forward(
        self, problem: ScanProblem, *, ungated: bool, keep: bool
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Implement `Kernels.scan_forward`."""
        sizes = _Sizes(problem)
        u = problem.inputs[0].u
        o = torch.empty_like(u)
        ps = [torch.empty_like(u) for _ in problem.inputs if ungated]
        carries = [
            u.new_empty(sizes.programs * sizes.chunks * BLOCK_CHANNELS * sizes.padded, dtype=torch.float32)
            for _ in problem.inputs
            if keep
        ]
        ways = [
            _way(problem, k, carries[k] if keep else None, p=_view_or_none(ps[k] if ungated else None))
            for k in range(len(problem.inputs))
        ]
        if u.numel():
            self._forward[(sizes.programs,)](*_two(ways), _view(o), **sizes.arguments)
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
        sizes = _Sizes(problem)
        batch, channels, steps, states = sizes.batch, sizes.channels, sizes.steps, sizes.states
        ways, grads, partials = [], [], []
        for k, given in enumerate(problem.inputs):
            g_u, g_delta = torch.empty_like(given.u), torch.empty_like(given.delta)
            shared = (batch * sizes.groups, sizes.blocks, steps, states)
            shapes = ((batch, channels, states), shared, shared, (batch, channels), (batch, channels))
            partials.append(tuple(given.u.new_empty(shape, dtype=torch.float32) for shape in shapes))
            grads.append((g_u, g_delta))
            g_p = _view_or_none(g_ps[k] if g_ps else None)
            ways.append(
                _way(problem, k, carries[k], g_p=g_p, g_u=_view(g_u), g_delta=_view(g_delta), partials=partials[-1])
            )
        if g_o.numel():
            self._backward[(sizes.programs,)](*_two(ways), _view(g_o), _view_or_none(g_z), **sizes.arguments)
        results = []
        for given, (g_u, g_delta), (partial_A, partial_B, partial_C, partial_D, partial_bias) in zip(
            problem.inputs, grads, partials, strict=True
        ):
            g_B, g_C = (
                partial.sum(1).view(batch, sizes.groups, steps, states).transpose(2, 3).reshape(given.B.shape)
                for partial in (partial_B, partial_C)
            )
            g_D = None if given.D is None else partial_D.sum(0)
            g_bias = None if given.bias is None else partial_bias.sum(0)
            results.append(ScanInputs(g_u, g_delta, partial_A.sum(0), g_B, g_C, g_D, g_bias))
        return results

    def conv_forward(self, x: Tensor, filters: Sequence[Filter], reverses: Sequence[bool]) -> list[Tensor]:
        """Implement `Kernels.conv_forward` with torch."""
        return [
            reference.causal_conv1d_silu(x, weight, bias, reverse=reverse)
            for (weight, bias), reverse in zip(filters, reverses, strict=True)
        ]

    def conv_backward(
        self, x: Tensor, filters: Sequence[Filter], reverses: Sequence[bool], g_outs: Sequence[Tensor], g_x: Tensor
    ) -> list[Filter]:
        """Implement `Kernels.conv_backward` with torch."""
        grads: list[Filter] = []
        total = torch.zeros_like(x, dtype=torch.float32)
        for (weight, bias), reverse, g_out in zip(filters, reverses, g_outs, strict=True):
            leaves = [t.detach().requires_grad_() for t in (x, weight, bias) if t is not None]
            with torch.enable_grad():
                out = reference.causal_conv1d_silu(*leaves, reverse=reverse)
            g_own, g_weight, *g_bias = torch.autograd.grad(out, leaves, g_out)
            total += g_own
            grads.append((g_weight, g_bias[0] if g_bias else None))
        g_x.copy_(total)
        return grads


class _Sizes:
    """The sizes of a problem, and the launch arguments that follow from them."""

    def __init__(self, problem: ScanProblem) -> None:
        first = problem.inputs[0]
        self.batch, self.channels, self.steps = first.u.shape
        self.states = first.A.shape[1]
        self.groups = first.B.shape[1] if first.B.dim() == 4 else 1
        self.blocks = -(-self.channels // (self.groups * BLOCK_CHANNELS))
        self.programs = self.batch * self.groups * self.blocks
        self.chunks = -(-self.steps // CHUNK_STEPS)
        self.padded = 1 << (self.states - 1).bit_length()
        self.arguments: dict[str, Any] = {
            "L": self.steps,
            "E_all": self.channels,
            "N_all": self.states,
            "G": self.groups,
            "blocks": self.blocks,
            "REVERSE_FIRST": problem.reverses[0],
            "REVERSE_SECOND": problem.reverses[-1],
            "SOFTPLUS": problem.softplus,
            "E": BLOCK_CHANNELS,
            "T": CHUNK_STEPS,
            "N": self.padded,
            "num_warps": WARPS,
        }


def _way(problem: ScanProblem, k: int, carries: Tensor | None, **others: Any) -> Way:
    given = problem.inputs[k]
    return Way(
        u=_view(given.u),
        delta=_view(given.delta),
        A=given.A,
        B=_view(given.B),
        C=_view(given.C),
        D=given.D,
        bias=given.bias,
        blend=None if problem.blend is None else problem.blend[k],
        z=_view_or_none(problem.z),
        carries=carries,
        **others,
    )


def _two(ways: Sequence[Way]) -> tuple[Way, Way | None]:
    return ways[0], ways[1] if len(ways) == 2 else None
