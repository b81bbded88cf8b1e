"""The oracle: both operators in plain torch, differentiated by autograd. It is slow and simple on purpose.

Definition: Mamba (Gu & Dao 2023, algorithm 2), `a = exp(dt A)` by zero-order hold, `dt B u` in the Euler-like form
that every released Mamba uses. `pipeline.ops.scan` documents and checks the shapes.
Bt batch, E channels, L steps, N states, G groups of channels that share B and C, K taps of the convolution.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.ops.precision import without_autocast


class Direction(NamedTuple):
    """The weights of a mixer for one direction, in the layout of nn.Linear and nn.Conv1d. R is the rank of the step size."""

    conv_weight: Tensor  # (E, 1, K)
    conv_bias: Tensor | None  # (E,)
    x_proj: Tensor  # (R + 2 N, E): rows for the low-rank step size, B, C
    dt_proj: Tensor  # (E, R)
    dt_bias: Tensor | None  # (E,), added inside the softplus
    A: Tensor  # (E, N), negative; or (H,), one rate per head, and then dt_proj, dt_bias and D have H rows too
    D: Tensor | None  # (E,)


@without_autocast
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
    """Compute the scan step by step, in fp32 (fp64 if `u` is fp64); the outputs have u's dtype."""
    inner = torch.float64 if u.dtype == torch.float64 else torch.float32
    groups = B.shape[1] if B.dim() == 4 else 1
    state = A.shape[1]
    inputs = u.to(inner)
    step = delta.to(inner)
    if delta_bias is not None:
        step = step + delta_bias.to(inner)[:, None]
    if delta_softplus:
        step = F.softplus(step)

    # Channels are split by group. One step of u and dt is (Bt, G, E/G), one of B and C is (Bt, G, 1, N).
    rates = A.to(inner).unflatten(0, (groups, -1))  # (G, E/G, N)
    steps = list(
        zip(
            inputs.unflatten(1, (groups, -1)).unbind(-1),
            step.unflatten(1, (groups, -1)).unbind(-1),
            B.to(inner).reshape(-1, groups, 1, state, u.shape[-1]).unbind(-1),
            C.to(inner).reshape(-1, groups, 1, state, u.shape[-1]).unbind(-1),
            strict=True,
        )
    )
    hidden = inputs.new_zeros(u.shape[0], groups, u.shape[1] // groups, state)
    outputs = []
    for u_t, dt_t, B_t, C_t in reversed(steps) if reverse else steps:
        hidden = torch.exp(dt_t[..., None] * rates) * hidden + (dt_t * u_t)[..., None] * B_t
        outputs.append((hidden * C_t).sum(-1))
    ungated = torch.stack(outputs[::-1] if reverse else outputs, dim=-1).flatten(1, 2)  # (Bt, E, L)

    out = ungated if D is None else ungated + D.to(inner)[:, None] * inputs
    if z is not None:
        out = out * F.silu(z.to(inner))
    out = out.to(u.dtype)
    return (out, ungated.to(u.dtype)) if return_ungated else out


@without_autocast
def causal_conv1d_silu(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, reverse: bool = False) -> Tensor:
    """Return SiLU of the depthwise convolution; output t sees inputs t-K+1..t, or t..t+K-1 with `reverse`."""
    inner = torch.float64 if x.dtype == torch.float64 else torch.float32
    taps = weight.shape[-1]
    kernel = weight.to(inner).flip(-1) if reverse else weight.to(inner)
    padded = F.pad(x.to(inner), (0, taps - 1) if reverse else (taps - 1, 0))
    convolved = F.conv1d(padded, kernel, None if bias is None else bias.to(inner), groups=x.shape[1])
    return F.silu(convolved).to(x.dtype)
