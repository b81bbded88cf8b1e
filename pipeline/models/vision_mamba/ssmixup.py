"""SSMixup: blends two opposite directions of a Vision Mamba mixer by confidence (Semi-ViM, README).

y = SiLU(z) y_forward + SiLU(z) y_backward + nu C h_mix with h_mix = psi h_forward + (1 - psi) h_backward, where h are states.
Since C h is linear in h, C h_mix = psi C h_forward + (1 - psi) C h_backward, so no state needs to be materialised:

- `own_C`: each direction's C reads its own states. The scans compute both terms anyway.
- `shared_C`: the forward direction's C reads both (the literal formula). This costs one more scan, backwards.

psi and 1 - psi are given as a `blend` (B, 2) without gradient. We take one psi for each image; the sources do not say.

Deviations: the mixer divides the whole sum, this term too, by its number of directions, as Vim does; the README shows no
such factor. With four directions each opposite pair is blended.

Shapes: B images, L tokens, E inner width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.ops.linear import linear
from pipeline.ops.scan import Direction, causal_conv1d_silu, mixer_scan, selective_scan


def mixed_scan(
    xz: Tensor, directions: Sequence[Direction], blend: Tensor, nu: Tensor | float, *, shared_C: bool
) -> Tensor:
    """Compute `mixer_scan` of two opposite directions, plus nu C h_mix.

    Args:
        xz: Inputs and gates of the scan, (B, L, 2E).
        directions: The forward and the backward one.
        blend: (B, 2), psi and 1 - psi of each image; it gets no gradient.
        nu: Strength of the term; a tensor (1,) is learned.
        shared_C: Read both directions' states with the forward one's C.

    Returns:
        (B, L, E); with nu = 0 it is `mixer_scan`'s result, bit for bit.
    """
    blend = blend.detach()
    if isinstance(nu, Tensor):
        # nu's gradient needs the readouts themselves.
        out, forward, backward = mixer_scan(xz, directions, return_ungated=True)
        if shared_C:
            backward = shared_readout(xz, *directions)
        psi, rest = blend.to(out.dtype)[:, :, None, None].unbind(1)
        return out + (nu * (psi * forward + rest * backward)).to(out.dtype)
    if nu == 0:
        return mixer_scan(xz, directions)
    if not shared_C:
        return mixer_scan(xz, directions, blend=nu * blend)
    psi, rest = blend.unbind(1)
    out = mixer_scan(xz, directions, blend=torch.stack([nu * psi, torch.zeros_like(psi)], dim=1))
    return out + (nu * rest)[:, None, None].to(out.dtype) * shared_readout(xz, *directions)


def shared_readout(xz: Tensor, forward: Direction, backward: Direction) -> Tensor:
    """Compute C_forward · h_backward, (B, L, E): at each token, the state after the tokens from the last back to it."""
    x = xz.transpose(1, 2)[:, : xz.shape[2] // 2]  # (B, E, L)
    states = forward.A.shape[1]
    ahead = causal_conv1d_silu(x, forward.conv_weight, forward.conv_bias).transpose(1, 2)
    C = linear(ahead, forward.x_proj[-states:]).transpose(1, 2)
    back = causal_conv1d_silu(x, backward.conv_weight, backward.conv_bias, reverse=True)
    rank = backward.dt_proj.shape[1]
    low, B, _ = linear(back.transpose(1, 2), backward.x_proj).split([rank, states, states], dim=2)
    delta = linear(low, backward.dt_proj).transpose(1, 2)
    read = selective_scan(back, delta, backward.A, B.transpose(1, 2), C, delta_bias=backward.dt_bias, reverse=True)
    return read.transpose(1, 2)
