"""Mixup, CutMix, and Semi-ViT's probabilistic pseudo-mixup: two images in one, two targets in one.

Every image of a batch is mixed with its partner (`Batch.partner`), each with its own ratio and its own box.
Shapes: B images, C classes, H, W height and width in pixels.
"""

import torch
from torch import Tensor


def mix(images: Tensor, targets: Tensor, partner: Tensor, ratio: Tensor, cut: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mix every image and its target with those of its partner.

    Args:
        images: (B, 3, H, W).
        targets: (B, C) class probabilities.
        partner: (B,) index of each image's partner.
        ratio: (B,) share that each image keeps of its own; the rest is its partner's.
        cut: (B,) bool; True = a box of the partner's pixels replaces the image's (CutMix), False = pixels are averaged
            (Mixup).

    Returns:
        The mixed images, the mixed targets, and (B,) the ratios that hold, since a box is clipped at the border.
    """
    height, width = images.shape[-2:]
    mask, kept = _boxes(ratio, height, width)
    ratio = torch.where(cut, kept, ratio)
    share = torch.where(cut[:, None, None], mask, ratio[:, None, None])[:, None]
    mixed = images * share + images[partner] * (1 - share)
    r = ratio[:, None]
    return mixed, targets * r + targets[partner] * (1 - r), ratio


def mix_by_confidence(
    images: Tensor, targets: Tensor, confidence: Tensor, partner: Tensor, cut_share: float
) -> tuple[Tensor, Tensor]:
    """Mix by confidence: probabilistic pseudo-mixup (Cai et al. 2022, Semi-ViT).

    An image of confidence c keeps the share c / (c + c of the partner).

    Deviation: Semi-ViT pairs by a random permutation of a process's batch. Here partners are found inside a virtual
    reader, so pairs are the same at every world size.

    Args:
        images: (B, 3, H, W).
        targets: (B, C) class probabilities.
        confidence: (B,) of the pseudo-labels.
        partner: (B,) index of each image's partner.
        cut_share: Probability that an image is cut instead of averaged.

    Returns:
        The mixed images and the mixed targets.
    """
    ratio = pair_ratio(confidence, partner)
    cut = torch.rand(len(images), device=images.device) < cut_share
    mixed, targets, _ = mix(images, targets, partner, ratio, cut)
    return mixed, targets


def mix_at_random(
    images: Tensor, targets: Tensor, partner: Tensor, *, mixup: float, cutmix: float
) -> tuple[Tensor, Tensor]:
    """Mix with ratios drawn from Beta(a, a).

    Args:
        images: (B, 3, H, W).
        targets: (B, C) class probabilities.
        partner: (B,) index of each image's partner.
        mixup: a of Mixup; 0 = off.
        cutmix: a of CutMix; 0 = off. If both are on, each image has even chances of either.

    Returns:
        The mixed images and the mixed targets.
    """
    if not mixup and not cutmix:
        return images, targets
    count, device = len(images), images.device
    both = bool(mixup and cutmix)
    cut = torch.rand(count, device=device) < 0.5 if both else torch.full((count,), not mixup, device=device)
    alpha = torch.where(cut, cutmix or 1.0, mixup or 1.0)
    ratio = torch.distributions.Beta(
        alpha, alpha, validate_args=False
    ).sample()  # to validate is to wait for the device
    mixed, targets, _ = mix(images, targets, partner, ratio, cut)
    return mixed, targets


def pair_ratio(confidence: Tensor, partner: Tensor) -> Tensor:
    """Return (B,) the ratio c / (c + c of the partner) of each confidence c."""
    return confidence / (confidence + confidence[partner]).clamp(min=1e-8)


def _boxes(ratio: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return (B, H, W), 0 inside a random box of area 1 - ratio and 1 outside, and (B,) the share outside."""
    side = (1 - ratio).clamp(min=0).sqrt()
    spans = []
    for length in (height, width):
        centre = torch.rand(len(ratio), device=ratio.device) * length
        half = side * length / 2
        low, high = (centre - half).clamp(0, length).round(), (centre + half).clamp(0, length).round()
        at = torch.arange(length, device=ratio.device)
        spans.append((at >= low[:, None]) & (at < high[:, None]))
    mask = 1 - (spans[0][:, :, None] & spans[1][:, None, :]).to(ratio.dtype)
    return mask, mask.mean((1, 2))
