"""Count the FLOPs of a forward pass on the meta device: for MFU, plans and tables."""

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


def forward_flops(model: nn.Module, image_size: tuple[int, int], in_chans: int = 3) -> int:
    """Count the FLOPs of a forward pass over one image: convolutions, matrix products and the scan.

    A multiply-add counts as 2. Papers that print "FLOPs" often mean multiply-adds, half of this. The model's weights are
    neither copied nor changed.

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
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        torch.func.functional_call(model, shapes, images)
    model.train(was_training)
    return counter.get_total_flops()
