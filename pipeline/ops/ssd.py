"""SSD: the scan with one scalar A per head, as chunked matrix products (Mamba-2, Dao & Gu 2024, listing 1).

h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T and y_t = h_t C_t + D x_t, with h_t (P, N) per head. This is plain torch on
CPU and GPU, differentiated by autograd. Heads come before steps in every product; with heads as the last axis the
products are twenty times slower on a CPU.

Deviations from the paper's listing: any number of steps (padding with dt = 0 changes nothing); a reversed direction;
the decays exp(s_t - s_r) are masked before the exponential, because inf * 0 gives NaN in the backward.

Bt batch, H heads, P channels of a head, E = H P, G groups of heads that share B and C, N states, L steps, Q steps of a
chunk, K chunks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.ops.precision import without_autocast

# Up to this number of steps, one masked product is faster than the recurrence over chunks. Beyond it, chunks of 64
# steps are fastest. Both were measured on a CPU.
SINGLE_CHUNK = 256
CHUNK = 64


@without_autocast
def ssd_scan(
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
    """Compute the SSD, with the signature of `selective_scan`, so that a mixer can use either.

    The result equals `selective_scan` with delta, A, D and delta_bias repeated over the channels of each head. Decays
    and step sizes are computed in fp32 (fp64 for fp64), the products in u's dtype.

    Args:
        u: (Bt, E, L).
        delta: (Bt, H, L); H divides E.
        A: (H,), negative.
        B: (Bt, N, L), or (Bt, G, N, L) with G dividing H.
        C: As B.
        D: (H,).
        z: The gate, (Bt, E, L).
        delta_bias: (H,), added to delta.
        delta_softplus: Whether dt is softplus(delta + delta_bias), or the sum itself.
        reverse: Whether the scan runs from step L-1 to step 0.
        return_ungated: Whether p is returned too.

    Returns:
        o (Bt, E, L) in u's dtype; with `return_ungated` also p = C·h (Bt, E, L), without gate and skip.

    Raises:
        ValueError: If the shapes do not fit together.
    """
    _check(u, delta, A, B, C, D, z, delta_bias)
    inner = torch.float64 if u.dtype == torch.float64 else torch.float32
    heads, steps = delta.shape[1], u.shape[2]
    if reverse:
        u, delta, B, C = (x.flip(-1) for x in (u, delta, B, C))
    dt = delta.to(inner)
    if delta_bias is not None:
        dt = dt + delta_bias.to(inner)[:, None]
    if delta_softplus:
        dt = F.softplus(dt)

    size = steps if steps <= SINGLE_CHUNK else CHUNK
    x = u.unflatten(1, (heads, u.shape[1] // heads)).transpose(2, 3)  # (Bt, H, L, P)
    driven = _chunks(x * dt[..., None].to(u.dtype), size)  # (Bt, H, K, Q, P)
    logs = _chunks((dt * A.to(inner)[:, None])[..., None], size)[..., 0].cumsum(-1)  # (Bt, H, K, Q)
    keys, queries = (_chunks(_by_head(m.to(u.dtype), heads), size) for m in (B, C))  # (Bt, H, K, Q, N)

    # Within a chunk: (C_t . B_r) exp(s_t - s_r) for r <= t.
    later = torch.ones(size, size, dtype=torch.bool, device=u.device).triu(1)
    decay = (logs[..., :, None] - logs[..., None, :]).masked_fill(later, -torch.inf).exp()
    y = (queries @ keys.transpose(-1, -2) * decay.to(u.dtype)) @ driven  # (Bt, H, K, Q, P)
    if y.shape[2] > 1:
        # Across chunks: a chunk adds its own state, decayed to its end, to the state before it.
        to_end = (logs[..., -1:] - logs).exp().to(u.dtype)
        added = (driven * to_end[..., None]).transpose(-1, -2) @ keys  # (Bt, H, K, P, N)
        state, before = torch.zeros_like(added[:, :, 0]), []
        for whole, own in zip(logs[..., -1].exp().to(u.dtype).unbind(2), added.unbind(2), strict=True):
            before.append(state)
            state = whole[..., None, None] * state + own
        handed = torch.stack(before, 2)  # (Bt, H, K, P, N)
        y = y + logs.exp().to(u.dtype)[..., None] * (queries @ handed.transpose(-1, -2))

    p = y.flatten(2, 3)[:, :, :steps]  # (Bt, H, L, P)
    out = p if D is None else p + D.to(u.dtype)[:, None, None] * x
    p, out = (t.transpose(2, 3).flatten(1, 2) for t in (p, out))  # (Bt, E, L)
    if reverse:
        p, out = p.flip(-1), out.flip(-1)
    if z is not None:
        out = out * F.silu(z)
    out = out.to(u.dtype)
    return (out, p) if return_ungated else out


def _chunks(x: Tensor, size: int) -> Tensor:
    """(Bt, H, L, F) -> (Bt, H, K, Q, F); the last chunk is padded with zeros."""
    return F.pad(x, (0, 0, 0, -x.shape[2] % size)).unflatten(2, (-1, size))


def _by_head(m: Tensor, heads: int) -> Tensor:
    """Return B or C as (Bt, H, L, N)."""
    grouped = m if m.dim() == 4 else m[:, None]
    return grouped.repeat_interleave(heads // grouped.shape[1], dim=1).transpose(2, 3)


def _check(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
) -> None:
    if u.dim() != 3 or u.shape[2] == 0 or not u.is_floating_point():
        raise ValueError(f"u must be floating point of shape (batch, channels, steps >= 1), got {tuple(u.shape)}")
    batch, channels, steps = u.shape
    heads = delta.shape[1] if delta.dim() == 3 else 0
    if heads == 0 or delta.shape != (batch, heads, steps) or channels % heads:
        raise ValueError(
            f"delta must have shape (batch, heads, steps) = ({batch}, H, {steps}) with H dividing the {channels} "
            f"channels, got {tuple(delta.shape)}"
        )
    for name, tensor in (("A", A), ("D", D), ("delta_bias", delta_bias)):
        if tensor is not None and tensor.shape != (heads,):
            raise ValueError(f"{name} must have one value per head, ({heads},), got {tuple(tensor.shape)}")
    if z is not None and z.shape != u.shape:
        raise ValueError(f"z must have the shape of u, {tuple(u.shape)}, got {tuple(z.shape)}")
    groups = B.shape[1] if B.dim() == 4 else 1
    plain, grouped = (batch, B.shape[-2], steps), (batch, groups, B.shape[-2], steps)
    if B.shape != C.shape or B.shape not in (plain, grouped) or groups == 0 or heads % groups:
        raise ValueError(
            f"B and C must both have shape ({batch}, N, {steps}), or ({batch}, G, N, {steps}) with G dividing the "
            f"{heads} heads, got {tuple(B.shape)} and {tuple(C.shape)}"
        )
