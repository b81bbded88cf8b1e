"""Grad-CAM (Selvaraju et al. 2017): where in the image the evidence for a class is.

With the map A (C, h, w) of a layer and the logit y of a class, the weight of a channel is the mean of dy/dA over the map.
The picture is ReLU(sum of weight x A), enlarged to the image. The sources do not name the layer of their figure; ours is
chosen in `target_layers.py`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.evaluate.target_layers import target_layers, watched


def gradcam(
    model: nn.Module, images: Tensor, classes: Tensor | None = None, *, among: int | None = None
) -> tuple[Tensor, Tensor]:
    """Map the evidence for a class in each image.

    Args:
        model: A classifier; it is left in the mode it had.
        images: Normalised images (B, 3, H, W).
        classes: Classes to explain (B,); None explains the predicted ones.
        among: Outputs that are classes, the first of all; None for all (a model under training may have a second head).

    Returns:
        Maps (B, H, W) in [0, 1], each with a largest value of 1 (or zero everywhere, without positive evidence), and the
        classes (B,) that they explain.
    """
    layers = target_layers(model)
    was_training = model.training
    model.eval()
    with torch.enable_grad(), watched(layers.gradcam) as seen:
        # The image is a leaf, so that the map has a gradient even where all weights are frozen.
        logits = model(images.detach().requires_grad_()).float()[:, :among]
        classes = logits.argmax(-1) if classes is None else classes.to(logits.device)
        (gradient,) = torch.autograd.grad(logits.gather(1, classes[:, None]).sum(), seen[-1])
    model.train(was_training)
    size = images.shape[2], images.shape[3]
    maps, gradient = layers.to_grid(seen[-1].detach(), size).float(), layers.to_grid(gradient, size).float()
    weights = gradient.mean((2, 3), keepdim=True)
    evidence = F.relu((weights * maps).sum(1, keepdim=True))
    evidence = F.interpolate(evidence, images.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
    largest = evidence.amax((1, 2), keepdim=True)
    return evidence / largest.clamp(min=torch.finfo(largest.dtype).tiny), classes


def overlay(images: Tensor, maps: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Draw maps over images that turn grey.

    The colours are cividis, which readers with a colour vision deficiency see as others do.

    Args:
        images: Normalised images (B, 3, H, W).
        maps: Maps (B, H, W) in [0, 1].
        mean: Mean of each colour that normalised the images.
        std: Standard deviation of each colour that normalised the images.

    Returns:
        Pixels (B, 3, H, W) in [0, 1].
    """
    from matplotlib import colormaps

    shape = (3, 1, 1)
    pixels = (images.float() * images.new_tensor(std).view(shape) + images.new_tensor(mean).view(shape)).clamp(0, 1)
    grey = pixels.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    colours = torch.from_numpy(colormaps["cividis"](maps.cpu().numpy())[..., :3]).to(images).permute(0, 3, 1, 2)
    strength = 0.25 + 0.5 * maps[:, None]
    return grey * (1 - strength) + colours * strength
