"""Compiled kernels under autograd: scan, convolution, and the whole chain of a mixer as one node.

fp32 and bf16 are computed directly; other dtypes are converted to fp32 and back. (`pipeline.ops.choice` gives fp64 to
the closed form in torch.) The backward of the chain is written by hand, so gradients are accumulated in place: between
the matrix products no split, concatenation or sum passes over (Bt, L, E) tensors remain.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.ops.kernels import Filter, Kernels, Projections, ScanInputs, ScanProblem
from pipeline.ops.precision import without_autocast
from pipeline.ops.reference import Direction


def _loadable(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype in (torch.float32, torch.bfloat16) else tensor.float()


def _plain(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float().contiguous()


def _inputs(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, bias: Tensor | None
) -> ScanInputs:
    return ScanInputs(
        _loadable(u), _loadable(delta), A.float().contiguous(), _loadable(B), _loadable(C), _plain(D), _plain(bias)
    )


def _like(grads: Sequence[Tensor | None], dtypes: Sequence[torch.dtype | None]) -> list[Tensor | None]:
    return [g if g is None or g.dtype == dtype else g.to(dtype) for g, dtype in zip(grads, dtypes, strict=True)]


def _dtypes(tensors: Sequence[Tensor | None]) -> list[torch.dtype | None]:
    return [None if t is None else t.dtype for t in tensors]


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        kernels: Kernels,
        keep: bool,
        softplus: bool,
        reverse: bool,
        ungated: bool,
        z: Tensor | None,
        *tensors: Any,
    ) -> Any:
        """Take `tensors` in the order u, delta, A, B, C, D, delta_bias."""
        ctx.kernels, ctx.softplus, ctx.reverse, ctx.dtypes = kernels, softplus, reverse, _dtypes((z, *tensors))
        gate = None if z is None else _loadable(z)
        problem = ScanProblem(inputs=[_inputs(*tensors)], reverses=[reverse], z=gate, blend=None, softplus=softplus)
        o, ps, carries = kernels.scan_forward(problem, ungated=ungated, keep=keep and any(ctx.needs_input_grad))
        ctx.save_for_backward(gate, *problem.inputs[0], *carries)
        return tuple(t.to(tensors[0].dtype) for t in (o, *ps))

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, g_o: Tensor, *g_ps: Tensor) -> Any:
        gate, *saved = ctx.saved_tensors
        count = len(ScanInputs._fields)
        given, carries = ScanInputs(*saved[:count]), saved[count:]
        problem = ScanProblem(inputs=[given], reverses=[ctx.reverse], z=gate, blend=None, softplus=ctx.softplus)
        g_z = None if gate is None else torch.empty_like(gate)
        (grads,) = ctx.kernels.scan_backward(problem, carries, _loadable(g_o), [_loadable(g) for g in g_ps], g_z)
        return None, None, None, None, None, *_like((g_z, *grads), ctx.dtypes)


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: Kernels, reverse: bool, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.kernels, ctx.reverse, ctx.dtypes = kernels, reverse, _dtypes((x, weight, bias))
        x, weight, bias = _loadable(x), weight.float().contiguous(), _plain(bias)
        ctx.save_for_backward(x, weight, bias)
        return kernels.conv_forward(x, [(weight, bias)], [reverse])[0].to(ctx.dtypes[0])

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, g_out: Tensor) -> Any:
        x, weight, bias = ctx.saved_tensors
        g_x = torch.empty_like(x)
        (grads,) = ctx.kernels.conv_backward(x, [(weight, bias)], [ctx.reverse], [_loadable(g_out)], g_x)
        return None, None, *_like((g_x, *grads), ctx.dtypes)


class _Mixer(torch.autograd.Function):
    """Convolutions, projections, scans and gate of one or two directions; keeps as much memory as plain autograd."""

    @staticmethod
    def forward(
        ctx: Any, kernels: Kernels, keep: bool, ungated: bool, blend: Tensor | None, xz: Tensor, *tensors: Tensor | None
    ) -> Any:
        """Take `tensors` as the fields of each Direction, one direction after another."""
        ctx.kernels, ctx.dtypes = kernels, _dtypes((xz, *tensors))
        directions = [Direction(*fields) for fields in zip(*[iter(tensors)] * len(Direction._fields), strict=True)]
        ctx.reverses = reverses = [k == 1 for k in range(len(directions))]
        xz = _loadable(xz)
        filters = [(d.conv_weight.float().contiguous(), _plain(d.conv_bias)) for d in directions]
        x, z = xz.transpose(1, 2).chunk(2, dim=1)  # (Bt, E, L), views
        with torch.autocast(xz.device.type, enabled=False):
            convolved = kernels.conv_forward(x, filters, reverses)
            inputs, matrices = [], []
            for d, u in zip(directions, convolved, strict=True):
                x_proj, dt_proj = d.x_proj.to(xz.dtype), d.dt_proj.to(xz.dtype)
                rank, states = dt_proj.shape[1], d.A.shape[1]
                projected, delta = kernels.project(u.transpose(1, 2), x_proj, dt_proj)  # (Bt, L, R + 2 N), (Bt, L, E)
                _, B, C = projected.split([rank, states, states], dim=2)
                inputs.append(
                    _inputs(
                        x if kernels.fuses_convolution else u,
                        delta.transpose(1, 2),
                        d.A,
                        B.transpose(1, 2),
                        C.transpose(1, 2),
                        d.D,
                        d.dt_bias,
                    )
                )
                matrices += [x_proj, dt_proj, projected]
            weights = None if blend is None else blend.detach().float().t().contiguous()
            problem = _mixer_problem(kernels, inputs, reverses, z, weights, filters)
            o, ps, carries = kernels.scan_forward(problem, ungated=ungated, keep=keep and any(ctx.needs_input_grad))
        flat = [t for pair in filters for t in pair] + [t for direction in inputs for t in direction]
        ctx.save_for_backward(xz, weights, *flat, *matrices, *carries)
        return tuple(t.transpose(1, 2).to(ctx.dtypes[0]) for t in (o, *ps))

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, g_o: Tensor, *g_ps: Tensor) -> Any:
        kernels, reverses, count = ctx.kernels, ctx.reverses, len(ctx.reverses)
        saved = iter(ctx.saved_tensors)
        xz, weights = next(saved), next(saved)
        filters = [(next(saved), next(saved)) for _ in range(count)]
        inputs = [ScanInputs(*(next(saved) for _ in ScanInputs._fields)) for _ in range(count)]
        matrices = [(next(saved), next(saved), next(saved)) for _ in range(count)]
        g_xz = torch.empty_like(xz, memory_format=torch.contiguous_format)
        (x, z), (g_x, g_z) = xz.transpose(1, 2).chunk(2, dim=1), g_xz.transpose(1, 2).chunk(2, dim=1)
        problem = _mixer_problem(kernels, inputs, reverses, z, weights, filters)
        g_ps = tuple(_loadable(g).transpose(1, 2) for g in g_ps)
        scans = kernels.scan_backward(problem, list(saved), _loadable(g_o).transpose(1, 2), g_ps, g_z)
        convolved = (
            kernels.conv_forward(x, filters, reverses) if kernels.fuses_convolution else [given.u for given in inputs]
        )
        g_projections, g_convolved = [], []
        for u, grads, (x_proj, dt_proj, projected) in zip(convolved, scans, matrices, strict=True):
            rank, states = dt_proj.shape[1], grads.A.shape[1]
            u, g_delta, g_u = (t.transpose(1, 2).flatten(0, 1) for t in (u, grads.delta, grads.u))  # (Bt L, E)
            g_projected = torch.empty_like(projected)
            g_projected[..., rank : rank + states] = grads.B.transpose(1, 2)
            g_projected[..., rank + states :] = grads.C.transpose(1, 2)
            given = Projections(u, x_proj, dt_proj, projected.flatten(0, 1))
            g_projections.append(kernels.project_backward(given, g_delta, g_projected.flatten(0, 1), g_u))
            g_convolved.append(g_u.view(*xz.shape[:2], x.shape[1]).transpose(1, 2))
        convs = kernels.conv_backward(x, filters, reverses, g_convolved, g_x)
        flat: list[Tensor | None] = [g_xz]
        for (g_weight, g_bias), (g_x_proj, g_dt_proj), scan in zip(convs, g_projections, scans, strict=True):
            flat += Direction(g_weight, g_bias, g_x_proj, g_dt_proj, scan.bias, scan.A, scan.D)
        return None, None, None, None, *_like(flat, ctx.dtypes)


def _mixer_problem(
    kernels: Kernels,
    inputs: Sequence[ScanInputs],
    reverses: Sequence[bool],
    z: Tensor,
    weights: Tensor | None,
    filters: Sequence[Filter],
) -> ScanProblem:
    fused = filters if kernels.fuses_convolution else ()
    return ScanProblem(inputs=inputs, reverses=reverses, z=z, blend=weights, softplus=True, filters=fused)


class Fused:
    """The operators of `pipeline.ops.scan` on one set of kernels.

    These methods ask whether gradients are enabled, because a Function cannot: in its forward autograd is always off,
    and `needs_input_grad` is true for parameters even under `no_grad`.

    Args:
        kernels: The compiled kernels.
    """

    def __init__(self, kernels: Kernels) -> None:
        self.kernels = kernels

    @without_autocast
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
        """Compute `pipeline.ops.scan.selective_scan`."""
        results = _Scan.apply(
            self.kernels,
            torch.is_grad_enabled(),
            delta_softplus,
            reverse,
            return_ungated,
            z,
            u,
            delta,
            A,
            B,
            C,
            D,
            delta_bias,
        )
        return results if return_ungated else results[0]

    @without_autocast
    def conv(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, reverse: bool = False) -> Tensor:
        """Compute `pipeline.ops.scan.causal_conv1d_silu`."""
        return _Conv.apply(self.kernels, reverse, x, weight, bias)

    def mixer(
        self,
        xz: Tensor,
        directions: Sequence[Direction],
        *,
        blend: Tensor | None = None,
        return_ungated: bool = False,
    ) -> tuple[Tensor, ...]:
        """Compute `pipeline.ops.scan.mixer_scan`, as a tuple."""
        return _Mixer.apply(
            self.kernels, torch.is_grad_enabled(), return_ungated, blend, xz, *(t for d in directions for t in d)
        )
