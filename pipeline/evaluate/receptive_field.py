"""Effective receptive fields (Luo et al. 2016), as EfficientViM's supplement draws them (Figure C).

The supplement says only "with respect to the central pixel of the output feature maps". The rest is the practice of
RepLKNet and VMamba: s = sum over channels of ReLU(map[centre]), the gradient of s with respect to the pixels, and its
positive values summed over images and colours.

Small images make every field fill the frame, and a map with an even side has no centre. At an odd multiple of the total
stride (960 at stride 64 gives 15 x 15) the picture is symmetric.
"""

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.evaluate.target_layers import target_layers, watched


def receptive_field(model: nn.Module, batches: Iterable[Tensor]) -> NDArray[np.float64]:
    """Average the positive gradient of the central output pixel over images.

    Args:
        model: A network with target layers; it is left in the mode it had.
        batches: Normalised images, (B, 3, H, W) each.

    Returns:
        The field (H, W), summed over colours.

    Raises:
        ValueError: If there are no images.
    """
    layers = target_layers(model)
    was_training = model.training
    model.eval()
    total, count = None, 0
    for images in batches:
        x = images.detach().clone().requires_grad_()
        with torch.enable_grad(), watched(layers.receptive_field) as seen:
            model(x)
            maps = layers.to_grid(seen[-1], (x.shape[2], x.shape[3])).float()
            centre = maps[:, :, maps.shape[2] // 2, maps.shape[3] // 2]
            (gradient,) = torch.autograd.grad(F.relu(centre).sum(), x)
        field = F.relu(gradient).sum((0, 1)).double().cpu()
        total, count = field if total is None else total + field, count + len(images)
    model.train(was_training)
    if total is None:
        raise ValueError("a receptive field needs at least one image")
    return (total / count).numpy()


def for_display(field: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return (field / largest value) ^ 0.2, in [0, 1]: a value a thousand times weaker is still drawn, at a quarter."""
    return (field / max(float(field.max()), np.finfo(np.float64).tiny)) ** 0.2


def side_of_share(field: NDArray[np.float64], share: float) -> int:
    """Return the side, in pixels, of the smallest centred square that holds `share` of the field (RepLKNet's r x r)."""
    height, width = field.shape
    total = field.sum()
    for side in range(1, min(height, width) + 1):
        top, left = (height - side) // 2, (width - side) // 2
        if field[top : top + side, left : left + side].sum() >= share * total:
            return side
    return max(height, width)
