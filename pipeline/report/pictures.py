"""Draw pictures of batches.

Shapes: R rows, n images a row, H x W pixels.
"""

import io
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from pipeline.images import decode

ENLARGED_SIDE = 96  # small images are enlarged to at least this many pixels


def write_grid(path: Path, rows: Tensor, *, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Write normalised images as a PNG.

    Args:
        path: The file.
        rows: Normalised images (R, n, 3, H, W).
        mean: Mean of each colour that normalised the images.
        std: Standard deviation of each colour that normalised the images.

    Returns:
        The picture's pixels (3, height, width) in [0, 1].
    """
    pixels = to_pixels(rows, mean, std)
    scale = -(-ENLARGED_SIDE // pixels.shape[-2])
    pixels = pixels.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    pixels = torch.nn.functional.pad(pixels, (2, 2, 2, 2), value=1.0)
    grid = pixels.permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)  # (3, R h, n w)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((grid.permute(1, 2, 0) * 255).round().byte().numpy()).save(path)
    return grid


def to_pixels(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Undo the normalisation of images (..., 3, H, W): pixels in [0, 1]."""
    shape = (3, 1, 1)
    return (images.cpu().float() * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)).clamp(0, 1)


def captioned(rows: Sequence[Tensor], names: Sequence[str], captions: Sequence[Sequence[str]]) -> Tensor:
    """Draw rows of pictures with captions.

    Args:
        rows: Pixels (n, 3, H, W) in [0, 1] of each row.
        names: Name of each row.
        captions: Text above each picture of each row.

    Returns:
        The picture's pixels (3, height, width) in [0, 1].
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from pipeline.report.figures import PLAIN_TEXT, picture_grid

    arrays = [list(row.permute(0, 2, 3, 1).numpy()) for row in rows]
    out = io.BytesIO()
    with rc_context(PLAIN_TEXT):
        canvas = Figure(figsize=(1.1 * len(arrays[0]) + 0.4, 1.25 * len(rows)), dpi=120, layout="constrained")
        picture_grid(arrays, names, captions)(canvas)
        canvas.savefig(out, format="png", facecolor="white")
    return torch.from_numpy(decode(out.getvalue())).permute(2, 0, 1) / 255
