"""The selective scan, its convolution, and a mixer's whole chain: one signature each, computed by what is here.

`selective_scan` and `causal_conv1d_silu` are the operators; `mixer_scan` is the chain of both that a mixer runs between
its two projections, which a kernel may fuse. `pipeline.ops.choice` decides who computes them. torch.compile ends its
graph before them and begins another behind: there is nothing in a kernel for it to fuse.

Bt batch, E channels, L steps, N states, G groups of channels that share B and C, K taps, R rank of the step size.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.ops.choice import Operators, operators_for
from pipeline.ops.reference import Direction
from pipeline.ops.shapes import check_conv, check_mixer, check_scan
from pipeline.ops.ssd import ssd_scan

__all__ = ["Direction", "causal_conv1d_silu", "mixer_scan", "selective_scan"]


@overload
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = ...,
    z: Tensor | None = ...,
    delta_bias: Tensor | None = ...,
    *,
    delta_softplus: bool = ...,
    reverse: bool = ...,
    return_ungated: Literal[False] = ...,
) -> Tensor: ...


@overload
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = ...,
    z: Tensor | None = ...,
    delta_bias: Tensor | None = ...,
    *,
    delta_softplus: bool = ...,
    reverse: bool = ...,
    return_ungated: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@torch.compiler.disable
def selective_scan(
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
    """o = (C·h + D u) SiLU(z) with h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t and dt = softplus(delta + delta_bias).

    u, delta, z: (Bt, E, L), any strides, fp32 or bf16 (others are computed, not fast); A: (E, N), negative, fp32;
    B, C: (Bt, N, L), or (Bt, G, N, L) where E/G neighbouring channels share a group; D, delta_bias: (E,), fp32.
    Computed in fp32 (fp64 for fp64 inputs). Returns o (Bt, E, L) in u's dtype; with `return_ungated` also
    p = C·h (Bt, E, L): no gate, no skip, which SSMixup blends. `reverse` scans from L-1 to 0 with the outputs in the
    original order: flip-scan-flip without the flips. Differentiable in every tensor.
    """
    check_scan(u, delta, A, B, C, D, z, delta_bias)
    return operators_for(u).scan(
        u,
        delta,
        A,
        B,
        C,
        D,
        z,
        delta_bias,
        delta_softplus=delta_softplus,
        reverse=reverse,
        return_ungated=return_ungated,
    )


@torch.compiler.disable
def causal_conv1d_silu(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, reverse: bool = False) -> Tensor:
    """SiLU(depthwise causal convolution + bias): output t sees steps t-K+1..t, or t..t+K-1 with `reverse`.

    x: (Bt, E, L), any strides; weight: (E, 1, K), K up to 8; bias: (E,). Returns (Bt, E, L) in x's dtype.
    `reverse` equals flip-conv-flip. Differentiable in every tensor.
    """
    check_conv(x, weight, bias)
    return operators_for(x).conv(x, weight, bias, reverse=reverse)


@overload
def mixer_scan(
    xz: Tensor, directions: Sequence[Direction], *, blend: Tensor | None = ..., return_ungated: Literal[False] = ...
) -> Tensor: ...


@overload
def mixer_scan(
    xz: Tensor, directions: Sequence[Direction], *, blend: Tensor | None = ..., return_ungated: Literal[True]
) -> tuple[Tensor, ...]: ...


@torch.compiler.disable
def mixer_scan(
    xz: Tensor, directions: Sequence[Direction], *, blend: Tensor | None = None, return_ungated: bool = False
) -> Tensor | tuple[Tensor, ...]:
    """SiLU(z) * (y_forward [+ y_backward]): all of a mixer between in_proj and out_proj, in one differentiable call.

    For each direction: v = causal_conv1d_silu(x), (low, B, C) = x_proj v, y = scan(v, dt_proj low, A, B, C, D).
    xz: (Bt, L, 2 E) as in_proj gives it, x first; `directions`: one, or two of which the second runs from the last
    step to the first. Returns o (Bt, L, E), the sum over the directions (Vim divides it by their number); with
    `return_ungated` (o, p_forward[, p_backward]), each p = C·h (Bt, L, E) without gate and skip. Four directions are
    two calls, the second on reordered steps. `blend` (Bt, directions) adds blend[:, k] p_k to o, ungated: SSMixup with
    nu psi and nu (1 - psi); it gets no gradient. A direction whose A is (H,) has one rate per head and is computed by
    `pipeline.ops.ssd.ssd_scan`; its dt_proj (H, R), dt_bias and D (H,) are per head too.

    Both directions share x, z and o, so a kernel that takes them together reads and writes those once, and the
    gradients of x, z and of each v need no sums: that is why this call exists beside the operators it is made of.
    """
    check_mixer(xz, directions, blend)
    operators = operators_for(xz)
    if directions[0].A.dim() == 1:
        operators = replace(operators, scan=ssd_scan, mixer=None)
    results = (operators.mixer or _composed(operators))(xz, directions, blend=blend, return_ungated=return_ungated)
    return results if return_ungated else results[0]


def _composed(operators: Operators) -> Callable[..., tuple[Tensor, ...]]:
    """The mixer's chain out of the two operators."""

    def mixer(
        xz: Tensor, directions: Sequence[Direction], *, blend: Tensor | None, return_ungated: bool
    ) -> tuple[Tensor, ...]:
        x, z = xz.transpose(1, 2).chunk(2, dim=1)  # (Bt, E, L)
        outs, ungated = [], []
        for k, d in enumerate(directions):
            v = operators.conv(x, d.conv_weight, d.conv_bias, reverse=k == 1)
            rank = d.dt_proj.shape[1]
            states = (d.x_proj.shape[0] - rank) // 2
            low, B, C = F.linear(v.transpose(1, 2), d.x_proj).split([rank, states, states], dim=2)
            delta = F.linear(low, d.dt_proj).transpose(1, 2)
            inputs = v, delta, d.A, B.transpose(1, 2), C.transpose(1, 2), d.D, z, d.dt_bias
            if return_ungated or blend is not None:
                out, p = operators.scan(*inputs, reverse=k == 1, return_ungated=True)
                ungated.append(p)
                outs.append(out if blend is None else out + blend[:, k, None, None].to(out.dtype).detach() * p)
            else:
                outs.append(operators.scan(*inputs, reverse=k == 1))
        total = outs[0] if len(outs) == 1 else outs[0] + outs[1]
        return tuple(t.transpose(1, 2) for t in ((total, *ungated) if return_ungated else (total,)))

    return mixer
