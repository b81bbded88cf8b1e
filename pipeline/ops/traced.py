"""The operators as the tracers of torch see them: torch.export and torch.compile at inference, and the ONNX exporter.

A tracer cannot see into our kernels. torch.export and torch.compile therefore get one opaque node for each call, which runs
the chosen implementation and has no gradient. A program that torch.export saved needs `import pipeline.ops.traced` where it is
loaded. ONNX gets plain operators around two nodes: `pipeline.exports.onnx` writes `pipeline::recurrence` as a Scan and
`pipeline::causal_conv1d_silu` as a Conv.

Shapes: Bt batch, E channels, L steps, N states.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.ops.choice import Operators, operators_for
from pipeline.ops.composed import composed_mixer
from pipeline.ops.reference import Direction
from pipeline.ops.ssd import ssd_scan


def as_one_node() -> bool:
    """Whether torch.export, or torch.compile without gradients, is tracing the caller."""
    return torch.compiler.is_exporting() or (torch.compiler.is_compiling() and not torch.is_grad_enabled())


def run_mixer(
    xz: Tensor, directions: Sequence[Direction], *, blend: Tensor | None, return_ungated: bool
) -> tuple[Tensor, ...]:
    """Compute `pipeline.ops.scan.mixer_scan` with the implementation for `xz`; the result is always a tuple."""
    operators = _operators_for(xz)
    is_ssd = directions[0].A.dim() == 1
    mixer = composed_mixer(ssd_scan, operators.conv) if is_ssd else operators.whole_mixer
    return mixer(xz, directions, blend=blend, return_ungated=return_ungated)


def run_scan(u: Tensor, *rest: Tensor | None, **how: bool) -> Tensor | tuple[Tensor, Tensor]:
    """Compute `pipeline.ops.scan.selective_scan` with the implementation for `u`."""
    return _operators_for(u).scan(u, *rest, **how)


def run_conv(x: Tensor, weight: Tensor, bias: Tensor | None, *, reverse: bool) -> Tensor:
    """Compute `pipeline.ops.scan.causal_conv1d_silu` with the implementation for `x`."""
    return _operators_for(x).conv(x, weight, bias, reverse=reverse)


def _operators_for(tensor: Tensor) -> Operators:
    """Return the chosen implementation, or, while the ONNX exporter traces, the operators for ONNX."""
    return _ONNX if torch.onnx.is_in_onnx_export() else operators_for(tensor)


@torch.library.custom_op("pipeline::mixer_scan", mutates_args=())
def mixer_node(
    xz: Tensor, weights: Sequence[Tensor | None], blend: Tensor | None, return_ungated: bool
) -> list[Tensor]:
    """`run_mixer` as a node; `weights` are the fields of its directions, one after another."""
    count = len(Direction._fields)
    directions = [Direction(*weights[at : at + count]) for at in range(0, len(weights), count)]  # type: ignore[arg-type]
    return [t.contiguous() for t in run_mixer(xz, directions, blend=blend, return_ungated=return_ungated)]


@mixer_node.register_fake
def _(xz: Tensor, weights: Sequence[Tensor | None], blend: Tensor | None, return_ungated: bool) -> list[Tensor]:
    outputs = 1 + return_ungated * len(weights) // len(Direction._fields)
    return [xz.new_empty(xz.shape[0], xz.shape[1], xz.shape[2] // 2) for _ in range(outputs)]


@torch.library.custom_op("pipeline::selective_scan", mutates_args=())
def scan_node(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    return_ungated: bool,
) -> list[Tensor]:
    """`run_scan` as a node."""
    how = {"delta_softplus": delta_softplus, "reverse": reverse, "return_ungated": return_ungated}
    found = run_scan(u, delta, A, B, C, D, z, delta_bias, **how)
    return [t.contiguous() for t in (found if isinstance(found, tuple) else (found,))]


@scan_node.register_fake
def _(u: Tensor, *rest: Any) -> list[Tensor]:
    return [u.new_empty(u.shape) for _ in range(1 + rest[-1])]


@torch.library.custom_op("pipeline::causal_conv1d_silu", mutates_args=())
def conv_node(x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool) -> Tensor:
    """The convolution as a node, for the ONNX exporter too: `run_conv` would come back here."""
    return operators_for(x).conv(x, weight, bias, reverse=reverse).contiguous()


@conv_node.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("pipeline::recurrence", mutates_args=())
def recurrence_node(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, reverse: bool) -> Tensor:
    """p_t = C_t·h_t with h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t.

    Args:
        x: (Bt, L, E).
        dt: (Bt, L, E), the step sizes themselves.
        A: (N, E).
        B: (Bt, L, N).
        C: (Bt, L, N).
        reverse: Whether the scan runs from step L-1 to step 0.

    Returns:
        (Bt, L, E).
    """
    u, delta, B, C = (t.transpose(1, 2) for t in (x, dt, B, C))
    found = operators_for(u).scan(
        u, delta, A.t(), B, C, None, None, None, delta_softplus=False, reverse=reverse, return_ungated=False
    )
    assert isinstance(found, Tensor)
    return found.transpose(1, 2).contiguous()


@recurrence_node.register_fake
def _(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, reverse: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _scan_of_nodes(
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
    """The scan for ONNX: all but the recurrence are operators that ONNX has. B and C have no groups."""
    x, dt = u.transpose(1, 2), delta.transpose(1, 2)
    if delta_bias is not None:
        dt = dt + delta_bias
    if delta_softplus:
        dt = _softplus(dt)
    p = torch.ops.pipeline.recurrence(x, dt, A.t(), B.transpose(1, 2), C.transpose(1, 2), reverse)
    out = p if D is None else p + D * x
    if z is not None:
        out = out * F.silu(z.transpose(1, 2))
    return (out.transpose(1, 2), p.transpose(1, 2)) if return_ungated else out.transpose(1, 2)


def _softplus(x: Tensor) -> Tensor:
    """Softplus of operators that ONNX Runtime computes on vectors; its own Softplus takes one number after another.

    It is max(x, 0) + log1p(e) with e = exp(-|x|), and log1p(e) = log(u) + (e - (u - 1)) / u with u = 1 + e rounded: what the
    rounding took from a small e is added to first order.
    """
    e = (-x.abs()).exp()
    u = 1 + e
    return x.relu() + (u.log() + (e - (u - 1)) / u)


def _conv_of_nodes(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, reverse: bool = False) -> Tensor:
    """The convolution for ONNX, whose Conv can pad one side only; torch's pads both, and the rest would have to be cut off."""
    return torch.ops.pipeline.causal_conv1d_silu(x, weight, bias, reverse)


_ONNX = Operators(name="onnx", scan=_scan_of_nodes, conv=_conv_of_nodes)
