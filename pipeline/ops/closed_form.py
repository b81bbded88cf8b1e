"""The scan in plain torch with a hand-written backward. It serves machines without a compiler, and fp64 everywhere.

Unlike the reference under autograd it keeps no (Bt, E, L, N) tensor. The forward saves the state at the beginning of
every chunk, and the backward recomputes one chunk at a time (closed form: Mamba's backward; spec of the operator, 4.2).
Inside a chunk all operations except the recurrence run over all steps at once.

Bt batch, G groups, E channels, C = E/G channels of a group, L steps, T steps of a chunk, N states.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.ops.precision import without_autocast

CHUNK = 16  # T: two (T, Bt, E, N) tensors of a usual layer fit the last-level cache


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
    """Compute `pipeline.ops.scan.selective_scan`. Autograd differentiates all operations except the recurrence."""
    inner = torch.float64 if u.dtype == torch.float64 else torch.float32
    groups = B.shape[1] if B.dim() == 4 else 1
    inputs = u.to(inner)
    dt = delta.to(inner)
    if delta_bias is not None:
        dt = dt + delta_bias.to(inner)[:, None]
    if delta_softplus:
        dt = F.softplus(dt)

    def by_step(x: Tensor) -> Tensor:  # (Bt, E, L) or (Bt, [G,] N, L) -> (L, Bt, G, E/G or N)
        x = x.to(inner) if x.dim() == 4 else x.to(inner).unflatten(1, (groups, x.shape[1] // groups))
        return x.movedim(-1, 0).flip(0) if reverse else x.movedim(-1, 0)

    ungated = _Recurrence.apply(
        by_step(dt * inputs), by_step(dt), A.to(inner).unflatten(0, (groups, -1)), by_step(B), by_step(C)
    )
    ungated = (ungated.flip(0) if reverse else ungated).flatten(2).movedim(0, -1)  # (Bt, E, L)
    out = ungated if D is None else ungated + D.to(inner)[:, None] * inputs
    if z is not None:
        out = out * F.silu(z.to(inner))
    out = out.to(u.dtype)
    return (out, ungated.to(u.dtype)) if return_ungated else out


def _states(dtu: Tensor, dt: Tensor, A: Tensor, B: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """Return the decays a (T, Bt, G, C, N) and states h (T + 1, Bt, G, C, N) of a chunk, with h[0] = `first`."""
    decay = torch.exp(dt[..., None] * A)
    hidden = torch.empty(decay.shape[0] + 1, *decay.shape[1:], dtype=decay.dtype, device=decay.device)
    hidden[0] = first
    torch.mul(dtu[..., None], B[..., None, :], out=hidden[1:])
    for t in range(decay.shape[0]):
        hidden[t + 1].addcmul_(decay[t], hidden[t])
    return decay, hidden


class _Recurrence(torch.autograd.Function):
    """p_t = C_t h_t with h_t = exp(dt_t A) h_{t-1} + (dt u)_t B_t; steps come first, channels are split by group."""

    @staticmethod
    def forward(ctx: Any, dtu: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        """dtu, dt: (L, Bt, G, C); A: (G, C, N); B, C: (L, Bt, G, N)."""
        hidden = dtu.new_zeros(1, *dtu.shape[1:], A.shape[-1])
        outputs, carries = [], []
        for at in range(0, dtu.shape[0], CHUNK):
            chunk = slice(at, at + CHUNK)
            carries.append(hidden[-1].clone())
            hidden = _states(dtu[chunk], dt[chunk], A, B[chunk], carries[-1])[1]
            outputs.append((hidden[1:] @ C[chunk][..., None])[..., 0])
        ctx.save_for_backward(dtu, dt, A, B, C, *carries)
        return torch.cat(outputs)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, g: Tensor) -> Any:
        dtu, dt, A, B, C, *carries = ctx.saved_tensors
        g_dtu, g_dt, g_B, g_C = (torch.empty_like(x) for x in (dtu, dt, B, C))
        g_A = torch.zeros_like(A)
        passed = torch.zeros_like(carries[0])  # a_{t+1} lam_{t+1}
        for k in reversed(range(len(carries))):
            chunk = slice(k * CHUNK, (k + 1) * CHUNK)
            decay, hidden = _states(dtu[chunk], dt[chunk], A, B[chunk], carries[k])
            g_C[chunk] = (g[chunk][..., None, :] @ hidden[1:])[..., 0, :]
            lam = g[chunk][..., None] * C[chunk][..., None, :]
            for t in reversed(range(lam.shape[0])):
                lam[t] += passed
                torch.mul(decay[t], lam[t], out=passed)
            g_dtu[chunk] = (lam @ B[chunk][..., None])[..., 0]
            g_B[chunk] = (dtu[chunk][..., None, :] @ lam)[..., 0, :]
            slope = lam.mul_(decay).mul_(hidden[:-1])  # lam a h_{t-1}: the gradient at dt A
            g_dt[chunk] = (slope * A).sum(-1)
            g_A += (slope * dt[chunk][..., None]).sum((0, 1))
        return g_dtu, g_dt, g_A, g_B, g_C
