"""Grad-CAM (Selvaraju et al. 2017): where in the image the evidence for a class is.

With the map A (C, h, w) of a layer and the logit y of a class, the weight of a channel is the mean of dy/dA over the map,
and the picture is ReLU(sum of weight x A), enlarged to the image. The sources say no more of their figure, so the layer is
the choice stated in `sight.py`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.evaluate.target_layers import sight_of, watched


def gradcam(model: nn.Module, images: Tensor, classes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Images (B, 3, H, W) -> maps (B, H, W) in [0, 1], the largest value of each 1, and the classes (B,) they explain.

    `classes`: none = what the model answers. A map without any positive evidence is zero everywhere.
    """
    sight = sight_of(model)
    was_training = model.training
    model.eval()
    with torch.enable_grad(), watched(sight.explained) as seen:
        # The image is a leaf, so that the map has a gradient even where all weights are frozen.
        logits = model(images.detach().requires_grad_()).float()
        classes = logits.argmax(-1) if classes is None else classes.to(logits.device)
        (gradient,) = torch.autograd.grad(logits.gather(1, classes[:, None]).sum(), seen[-1])
    model.train(was_training)
    size = images.shape[2], images.shape[3]
    maps, gradient = sight.to_grid(seen[-1].detach(), size).float(), sight.to_grid(gradient, size).float()
    weights = gradient.mean((2, 3), keepdim=True)
    evidence = F.relu((weights * maps).sum(1, keepdim=True))
    evidence = F.interpolate(evidence, images.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
    largest = evidence.amax((1, 2), keepdim=True)
    return evidence / largest.clamp(min=torch.finfo(largest.dtype).tiny), classes


def overlay(images: Tensor, maps: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Normalised images (B, 3, H, W) under their maps (B, H, W) -> pixels (B, 3, H, W) in [0, 1].

    The image is grey and the map is cividis, which readers with a colour deficiency see as others do.
    """
    from matplotlib import colormaps

    shape = (3, 1, 1)
    pixels = (images.float() * images.new_tensor(std).view(shape) + images.new_tensor(mean).view(shape)).clamp(0, 1)
    grey = pixels.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    colours = torch.from_numpy(colormaps["cividis"](maps.cpu().numpy())[..., :3]).to(images).permute(0, 3, 1, 2)
    strength = 0.25 + 0.5 * maps[:, None]
    return grey * (1 - strength) + colours * strength
