"""mamba-ssm's CUDA kernel behind our signature.

The kernel computes one direction and returns only the gated output. It needs one dtype for u, delta, B, C and z, and
contiguous tensors with the steps last. So this file flips the tensors for a reversed scan, and applies the gate itself
if the ungated output is wanted. The kernel is compiled with fast math, and its backward adds with atomics: compare its
results at 1e-3, and expect other bits in every run.
"""

import torch.nn.functional as F
from torch import Tensor

from pipeline.ops.precision import without_autocast


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
    """Compute `pipeline.ops.scan.selective_scan`."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    def turn(x: Tensor) -> Tensor:
        return x.flip(-1) if reverse else x

    def ready(x: Tensor) -> Tensor:
        return turn(x).to(u.dtype).contiguous()

    bias = None if delta_bias is None else delta_bias.float()
    skip = None if D is None else D.float()
    wide = ready(u), ready(delta), A.float().contiguous(), ready(B), ready(C)
    if not return_ungated:
        gate = None if z is None else ready(z)
        return turn(selective_scan_fn(*wide, skip, gate, bias, delta_softplus=delta_softplus))
    p = turn(selective_scan_fn(*wide, None, None, bias, delta_softplus=delta_softplus))
    out = p.float() if skip is None else p.float() + skip[:, None] * u.float()
    if z is not None:
        out = out * F.silu(z.float())
    return out.to(u.dtype), p
