"""The selective scan, its convolution, and the whole chain of a mixer: one signature each for all implementations.

`selective_scan` and `causal_conv1d_silu` are the operators. `mixer_scan` is the chain of both that a mixer runs between
its two projections; a kernel may fuse it. `pipeline.ops.choice` chooses the implementation. torch.compile breaks its
graph before and after these calls in training, because it cannot fuse anything into a kernel. At inference, and for
torch.export, a call is one node of the graph (`pipeline.ops.traced`).

Bt batch, E channels, L steps, N states, G groups of channels that share B and C, K taps, R rank of the step size.
"""

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from pipeline.ops.reference import Direction
from pipeline.ops.shapes import check_conv, check_mixer, check_scan
from pipeline.ops.traced import as_one_node, conv_node, mixer_node, run_conv, run_mixer, run_scan, scan_node

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
    """Compute o = (C·h + D u) SiLU(z) with h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t, dt = softplus(delta + delta_bias).

    The scan is computed in fp32 (in fp64 for fp64 inputs), under autocast too, and is differentiable in every tensor.

    Args:
        u: (Bt, E, L), any strides, fp32 or bf16; other dtypes are correct but slow.
        delta: As u.
        A: (E, N), negative, fp32.
        B: (Bt, N, L), or (Bt, G, N, L) where E/G neighbouring channels share a group.
        C: As B.
        D: The skip, (E,), fp32.
        z: The gate, as u.
        delta_bias: (E,), fp32.
        delta_softplus: Whether dt is softplus(delta + delta_bias), or the sum itself.
        reverse: Whether the scan runs from step L-1 to step 0. Outputs keep the original order, so this equals
            flip, scan, flip without the flips.
        return_ungated: Whether p is returned too.

    Returns:
        o (Bt, E, L) in u's dtype; with `return_ungated` also p = C·h (Bt, E, L), without gate and skip, for SSMixup.

    Raises:
        ValueError: If the shapes do not fit together.
    """
    check_scan(u, delta, A, B, C, D, z, delta_bias)
    tensors = u, delta, A, B, C, D, z, delta_bias
    if as_one_node():
        found = tuple(scan_node(*tensors, delta_softplus, reverse, return_ungated))
        return (found[0], found[1]) if return_ungated else found[0]
    return _scan(*tensors, delta_softplus=delta_softplus, reverse=reverse, return_ungated=return_ungated)


def causal_conv1d_silu(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, reverse: bool = False) -> Tensor:
    """Compute SiLU(depthwise causal convolution + bias), differentiable in every tensor.

    Args:
        x: (Bt, E, L), any strides.
        weight: (E, 1, K), K up to 8.
        bias: (E,).
        reverse: Output t sees steps t..t+K-1 instead of t-K+1..t; this equals flip, convolve, flip.

    Returns:
        (Bt, E, L) in x's dtype.

    Raises:
        ValueError: If the shapes do not fit together.
    """
    check_conv(x, weight, bias)
    return conv_node(x, weight, bias, reverse) if as_one_node() else _conv(x, weight, bias, reverse=reverse)


@overload
def mixer_scan(
    xz: Tensor, directions: Sequence[Direction], *, blend: Tensor | None = ..., return_ungated: Literal[False] = ...
) -> Tensor: ...


@overload
def mixer_scan(
    xz: Tensor, directions: Sequence[Direction], *, blend: Tensor | None = ..., return_ungated: Literal[True]
) -> tuple[Tensor, ...]: ...


def mixer_scan(
    xz: Tensor, directions: Sequence[Direction], *, blend: Tensor | None = None, return_ungated: bool = False
) -> Tensor | tuple[Tensor, ...]:
    """Compute SiLU(z) * (y_forward [+ y_backward]): a mixer between in_proj and out_proj, as one differentiable call.

    For each direction: v = causal_conv1d_silu(x), (low, B, C) = x_proj v, y = scan(v, dt_proj low, A, B, C, D). A mixer
    with four directions makes two calls, the second one on reordered steps.

    The projections are computed in the dtype of `xz`, whatever autocast would choose.

    This call exists beside its operators because both directions share x, z and o. A kernel that computes them together
    reads and writes those once, and the gradients of x, z and each v need no sums.

    Args:
        xz: (Bt, L, 2 E), the output of in_proj, x first.
        directions: One direction, or two of which the second runs from the last step to the first. A direction whose A
            is (H,) has one rate per head; `pipeline.ops.ssd.ssd_scan` computes it, and its dt_proj (H, R), dt_bias and
            D (H,) are per head too.
        blend: (Bt, directions). Adds blend[:, k] p_k to o, ungated: SSMixup with nu psi and nu (1 - psi). It gets no
            gradient.
        return_ungated: Whether the p are returned too.

    Returns:
        o (Bt, L, E), the sum over the directions (Vim divides it by their number). With `return_ungated`
        (o, p_forward[, p_backward]), each p = C·h (Bt, L, E) without gate and skip.

    Raises:
        ValueError: If the shapes do not fit together.
    """
    check_mixer(xz, directions, blend)
    if as_one_node():
        weights = [weight for direction in directions for weight in direction]
        results = tuple(mixer_node(xz, weights, blend, return_ungated))
    else:
        results = _mixer(xz, directions, blend=blend, return_ungated=return_ungated)
    return results if return_ungated else results[0]


# torch.compile breaks its graph around these in training.
_scan, _conv, _mixer = map(torch.compiler.disable, (run_scan, run_conv, run_mixer))
