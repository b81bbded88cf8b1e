"""SSMixup: two opposite directions of a Vision Mamba mixer blended by confidence (Semi-ViM, README).

y = SiLU(z) y_forward + SiLU(z) y_backward + nu C h_mix with h_mix = psi h_forward + (1 - psi) h_backward, h the states.
Because C h is linear in h, C h_mix is psi C h_forward + (1 - psi) C h_backward, and no state is ever materialised:

- `own_C`     each direction's states are read by its own C: both terms are what the scans compute anyway.
- `shared_C`  the forward direction's C reads both (the literal formula): one more scan, backwards.

psi and 1 - psi come as a `blend` (B, 2) without gradient; psi is of an image, the sources do not say of what else.
Deviation: the mixer divides the whole sum, this term too, by its number of directions, as Vim does; the README shows no
such factor. With four directions each opposite pair is blended.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.ops.scan import Direction, causal_conv1d_silu, mixer_scan, selective_scan


def mixed_scan(
    xz: Tensor, directions: Sequence[Direction], blend: Tensor, nu: Tensor | float, *, shared_C: bool
) -> Tensor:
    """`mixer_scan` of two directions plus nu C h_mix: xz (B, L, 2E), blend (B, 2) -> (B, L, E).

    A nu that is a tensor (1,) is learned; with nu = 0 the result is `mixer_scan`'s, bit for bit.
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
    """C_forward · h_backward, (B, L, E): at each token, the state after the tokens from the last down to it."""
    x = xz.transpose(1, 2)[:, : xz.shape[2] // 2]  # (B, E, L)
    states = forward.A.shape[1]
    ahead = causal_conv1d_silu(x, forward.conv_weight, forward.conv_bias).transpose(1, 2)
    C = F.linear(ahead, forward.x_proj[-states:]).transpose(1, 2)
    back = causal_conv1d_silu(x, backward.conv_weight, backward.conv_bias, reverse=True)
    rank = backward.dt_proj.shape[1]
    low, B, _ = F.linear(back.transpose(1, 2), backward.x_proj).split([rank, states, states], dim=2)
    delta = F.linear(low, backward.dt_proj).transpose(1, 2)
    read = selective_scan(back, delta, backward.A, B.transpose(1, 2), C, delta_bias=backward.dt_bias, reverse=True)
    return read.transpose(1, 2)
