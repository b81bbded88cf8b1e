"""The scan without numbers: on the meta device it gives shapes, and tells FlopCounterMode what it would cost.

So the cost of a model is counted on any machine before a byte is allocated, whichever kernel will compute it later.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


@torch.library.custom_op("pipeline::scan", mutates_args=(), device_types="meta")
def _scan(u: Tensor, states: int) -> Tensor:
    return torch.empty_like(u)


@_scan.register_fake
def _(u: Tensor, states: int) -> Tensor:
    return torch.empty_like(u)


def scan_flops(batch: int, channels: int, steps: int, states: int) -> int:
    """9 N + 4 a channel and step, as Mamba's authors count: the recurrence and C·h; skip, gate and softplus.

    Exponentials are not counted, nor what an implementation computes beyond the recurrence.
    """
    return batch * channels * steps * (9 * states + 4)


@register_flop_formula(torch.ops.pipeline.scan)
def _(u_shape: tuple[int, int, int], states: int, *, out_shape: tuple[int, ...]) -> int:
    return scan_flops(*u_shape, states)


def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, *_: Tensor | None, return_ungated: bool = False, **__: bool
) -> Tensor | tuple[Tensor, Tensor]:
    """The signature of `pipeline.ops.reference.selective_scan`; no gradients."""
    out = torch.ops.pipeline.scan(u, A.shape[1])
    return (out, torch.empty_like(u)) if return_ungated else out
