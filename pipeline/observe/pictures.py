"""Pictures of batches."""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

ENLARGED_SIDE = 96  # small images are enlarged to at least this many pixels


def write_grid(path: Path, rows: Tensor, *, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """rows (R, n, 3, H, W), normalised -> a PNG of R rows; returns its pixels (3, height, width) in [0, 1]."""
    shape = (3, 1, 1)
    pixels = (rows.cpu().float() * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)).clamp(0, 1)
    scale = -(-ENLARGED_SIDE // pixels.shape[-2])
    pixels = pixels.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    pixels = torch.nn.functional.pad(pixels, (2, 2, 2, 2), value=1.0)
    grid = pixels.permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)  # (3, R h, n w)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((grid.permute(1, 2, 0) * 255).round().byte().numpy()).save(path)
    return grid
