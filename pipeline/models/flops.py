"""Count the FLOPs of a forward pass on the meta device: for MFU, plans and tables."""

from collections import Counter
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from pipeline.ops.meta import scan_flops


class ScanSize(NamedTuple):
    """The size of a scan of one image: channels E, steps L, states N."""

    channels: int
    steps: int
    states: int


@dataclass(frozen=True)
class ForwardCost:
    """What a forward pass over one image costs.

    Attributes:
        flops: FLOPs of convolutions, matrix products and scans; a multiply-add counts as 2.
        scans: The scans by their size, each with its number.
    """

    flops: int
    scans: Counter[ScanSize]

    @property
    def products(self) -> int:
        """FLOPs without those of the scans."""
        return self.flops - sum(n * scan_flops(1, *size) for size, n in self.scans.items())


class _Scans(TorchDispatchMode):
    """Notes the scans of a forward pass on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[ScanSize] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.pipeline.scan.default:
            batch, channels, steps = args[0].shape
            self.found[ScanSize(channels, steps, args[1])] += batch
        return function(*args, **(kwargs or {}))


def forward_flops(model: nn.Module, image_size: tuple[int, int], in_chans: int = 3) -> int:
    """Count the FLOPs of a forward pass over one image: convolutions, matrix products and the scan.

    A multiply-add counts as 2. Papers that print "FLOPs" often mean multiply-adds, half of this. The model's weights are
    neither copied nor changed. The arguments are those of `forward_cost`.
    """
    return forward_cost(model, image_size, in_chans).flops


def forward_cost(model: nn.Module, image_size: tuple[int, int], in_chans: int = 3) -> ForwardCost:
    """Count what a forward pass over one image costs, on the meta device.

    Args:
        model: In any mode; it is counted in eval mode.
        image_size: (height, width) in pixels.
        in_chans: Channels of the image.
    """
    shapes: dict[str, Tensor] = {name: torch.empty_like(b, device="meta") for name, b in model.named_buffers()}
    for name, p in model.named_parameters():
        shapes[name] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
    images = torch.empty(1, in_chans, *image_size, device="meta")
    was_training = model.training
    model.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter, _Scans() as scans:
        torch.func.functional_call(model, shapes, images)
    model.train(was_training)
    return ForwardCost(counter.get_total_flops(), scans.found)
