"""Two images in one, two targets in one: mixup, cutmix, and Semi-ViT's probabilistic pseudo-mixup. B images, C classes.

Every image of a batch is mixed with its partner (`Batch.partner`), each with its own ratio and its own box.
"""

import torch
from torch import Tensor


def mix(images: Tensor, targets: Tensor, partner: Tensor, ratio: Tensor, cut: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Images (B, 3, H, W) and targets (B, C) with a share `ratio` (B,) of their own and the rest of their partner's.

    Where `cut` (B,), a box of the partner's pixels stands in the image (CutMix); elsewhere pixels are averaged (Mixup).
    Returns images, targets, and the ratios (B,) that hold, since a box is clipped at the border.
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
    """Probabilistic pseudo-mixup (Cai et al. 2022, Semi-ViT): own share c / (c + c of the partner); each image is cut with
    probability `cut_share`.

    Deviation: Semi-ViT pairs by a random permutation of a process's batch, this inside each
    virtual reader, alike at every world size.
    """
    ratio = pair_ratio(confidence, partner)
    cut = torch.rand(len(images), device=images.device) < cut_share
    mixed, targets, _ = mix(images, targets, partner, ratio, cut)
    return mixed, targets


def mix_at_random(
    images: Tensor, targets: Tensor, partner: Tensor, *, mixup: float, cutmix: float
) -> tuple[Tensor, Tensor]:
    """Mixup and CutMix with ratios from Beta(a, a); a of each method, 0 switches it off; even chances if both are on."""
    if not mixup and not cutmix:
        return images, targets
    count = len(images)
    cut = torch.full((count,), not mixup) if not (mixup and cutmix) else torch.rand(count) < 0.5
    alpha = torch.where(cut, torch.tensor(cutmix or 1.0), torch.tensor(mixup or 1.0))
    ratio = torch.distributions.Beta(alpha, alpha).sample().to(images.device)
    mixed, targets, _ = mix(images, targets, partner, ratio, cut.to(images.device))
    return mixed, targets


def pair_ratio(confidence: Tensor, partner: Tensor) -> Tensor:
    """(B,) c / (c + c of the partner)."""
    return confidence / (confidence + confidence[partner]).clamp(min=1e-8)


def _boxes(ratio: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """(B, H, W) 0 inside a random box of area 1 - ratio, 1 outside; and (B,) the share that is outside."""
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
