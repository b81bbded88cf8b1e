"""The chain of a mixer, composed of the two operators: what an implementation without a fused mixer runs."""

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from pipeline.ops.precision import without_autocast
from pipeline.ops.reference import Direction


def composed_mixer(scan: Callable[..., Any], conv: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """Return a mixer with the signature of `pipeline.ops.scan.mixer_scan`, except that it always returns a tuple.

    Args:
        scan: With the signature of `pipeline.ops.reference.selective_scan`.
        conv: With the signature of `pipeline.ops.reference.causal_conv1d_silu`.
    """

    @without_autocast
    def mixer(
        xz: Tensor, directions: Sequence[Direction], *, blend: Tensor | None, return_ungated: bool
    ) -> tuple[Tensor, ...]:
        x, z = xz.transpose(1, 2).chunk(2, dim=1)  # (Bt, E, L)
        outs, ungated = [], []
        for k, d in enumerate(directions):
            v = conv(x, d.conv_weight, d.conv_bias, reverse=k == 1)
            rank = d.dt_proj.shape[1]
            states = (d.x_proj.shape[0] - rank) // 2
            low, B, C = F.linear(v.transpose(1, 2), d.x_proj.to(v.dtype)).split([rank, states, states], dim=2)
            delta = F.linear(low, d.dt_proj.to(v.dtype)).transpose(1, 2)
            inputs = v, delta, d.A, B.transpose(1, 2), C.transpose(1, 2), d.D, z, d.dt_bias
            if return_ungated or blend is not None:
                out, p = scan(*inputs, reverse=k == 1, return_ungated=True)
                ungated.append(p)
                outs.append(out if blend is None else out + blend[:, k, None, None].to(out.dtype).detach() * p)
            else:
                outs.append(scan(*inputs, reverse=k == 1))
        total = outs[0] if len(outs) == 1 else outs[0] + outs[1]
        return tuple(t.transpose(1, 2) for t in ((total, *ungated) if return_ungated else (total,)))

    return mixer
