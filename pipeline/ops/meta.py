"""The scan on the meta device: it returns shapes, and tells FlopCounterMode how many FLOPs the scan costs.

So the cost of a model can be counted on any machine before memory is allocated, whichever kernel computes it later.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

torch.library.define("pipeline::scan", "(Tensor u, int states, Tensor[] others) -> Tensor")


@torch.library.register_fake("pipeline::scan")  # serves the meta device too
def _(u: Tensor, states: int, others: Sequence[Tensor]) -> Tensor:
    return torch.empty_like(u)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    u, _, others = inputs
    ctx.save_for_backward(u, *others)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, list[Tensor]]:
    u, *others = (torch.empty_like(x) for x in ctx.saved_tensors)
    return u, None, others


torch.library.register_autograd("pipeline::scan", _backward, setup_context=_keep)


def scan_flops(batch: int, channels: int, steps: int, states: int) -> int:
    """Return the FLOPs of a scan: 9 N + 4 for each channel and step, as Mamba's authors count.

    9 N are the recurrence and C·h; 4 are the skip, the gate and the softplus. Exponentials are not counted, and neither
    is what an implementation computes beyond the recurrence.
    """
    return batch * channels * steps * (9 * states + 4)


@register_flop_formula(torch.ops.pipeline.scan)
def _(u_shape: tuple[int, int, int], states: int, others: Any, *, out_shape: tuple[int, ...]) -> int:
    return scan_flops(*u_shape, states)


def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, *rest: Tensor | None, return_ungated: bool = False, **_: bool
) -> Tensor | tuple[Tensor, Tensor]:
    """Return empty outputs in the shapes of `pipeline.ops.reference.selective_scan`; all inputs get gradients."""
    out = torch.ops.pipeline.scan(u, A.shape[1], [delta, A, *(x for x in rest if x is not None)])
    return (out, torch.empty_like(u)) if return_ungated else out
