"""Geometry of training views: random crops and random affine maps, both in coordinates of the decoded image.

Shapes: H, W height and width of the view in pixels.
"""

import math
import random
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.images import Pixels
from pipeline.ops.affine import Map, affine_sample
from pipeline.streaming.config import AffineConfig

Box = tuple[int, int, int, int]  # top, left, height, width
Colour = tuple[int, ...]  # red, green, blue, 0 to 255

MAX_SCALED = 16_000_000  # pixels of an image between the two passes of a resize, which goes along the rows first
DENSE = 0.75  # pixels of a view per pixel of the image from which on interpolation does not alias visibly
MARGIN = 3  # pixels, after the first resize, that bicubic interpolation reads beyond a view, and one for rounding


@dataclass(frozen=True)
class Affine:
    """An affine map of a view about its centre: shear, then scale, then rotation, then translation.

    Attributes:
        rotation: Degrees, clockwise.
        scale: Factor by which the content grows.
        shear: Degrees along x and along y.
        translation: Shift to the right and down, as fractions of the view's width and height.
    """

    rotation: float
    scale: float
    shear: tuple[float, float]
    translation: tuple[float, float]

    def inverse(self) -> tuple[float, float, float, float]:
        """Return the matrix (xx, xy, yx, yy) from offsets in the view to offsets in the crop.

        The convention is that of torchvision's `affine`: the content is sheared along x, then along y, scaled, and turned.
        """
        turn, along_x, along_y = (math.radians(angle) for angle in (self.rotation, *self.shear))
        cos, sin, x, y = math.cos(turn), math.sin(turn), math.tan(along_x), math.tan(along_y)
        lower = (y * cos - sin, y * sin + cos)
        upper = (cos + x * lower[0], sin + x * lower[1])
        return upper[0] / self.scale, upper[1] / self.scale, lower[0] / self.scale, lower[1] / self.scale


def draw_affine(rng: random.Random, config: AffineConfig) -> Affine:
    """Draw a map; the number of draws does not depend on the config."""
    return Affine(
        rotation=rng.uniform(-config.rotation, config.rotation),
        scale=math.exp(rng.uniform(math.log(config.scale[0]), math.log(config.scale[1]))),
        shear=(rng.uniform(-config.shear, config.shear), rng.uniform(-config.shear, config.shear)),
        translation=(
            rng.uniform(-config.translation, config.translation),
            rng.uniform(-config.translation, config.translation),
        ),
    )


def ground_colour(image: Pixels) -> Colour:
    """Return the median colour of the outermost pixels: the paper of a scan, the ground of an icon."""
    height, width = image.shape[:2]
    rows, columns = image[:: max(1, height // 64)], image[:, :: max(1, width // 64)]
    border = np.concatenate([columns[0], columns[-1], rows[:, 0], rows[:, -1]])
    border.sort(axis=0)
    return tuple(border[len(border) // 2].tolist())


def affine_view(
    image: Pixels, box: Box, size: tuple[int, int], affine: Affine, interpolation: str, ground: Colour
) -> Tensor:
    """Return a box resized to (3, *size) uint8 under an affine map.

    The map and the crop are one map into the image. So a turned corner shows what the image has there, and the ground only
    where the image ends. What the view shrinks is first resized with antialiasing; the rest is interpolated once.

    Args:
        image: The decoded image.
        box: What the view would show without the map.
        size: H, W.
        affine: The map.
        interpolation: "bilinear" or "bicubic".
        ground: Colour of points outside the image.
    """
    (height, width), (top, left, box_height, box_width) = size, box
    step_x, step_y = box_width / width, box_height / height  # source pixels per pixel of the crop
    xx, xy, yx, yy = affine.inverse()
    xx, xy, yx, yy = xx * step_x, xy * step_x, yx * step_y, yy * step_y  # from the view into the image
    shift_x, shift_y = (0.5 + affine.translation[0]) * width, (0.5 + affine.translation[1]) * height
    at_x = left + box_width / 2 - xx * shift_x - xy * shift_y
    at_y = top + box_height / 2 - yx * shift_x - yy * shift_y
    dense_x, dense_y = affine.scale / step_x, affine.scale / step_y  # pixels of the view per pixel of the image
    x0, x1 = _read(at_x, xx * width, xy * height, image.shape[1], dense_x)
    y0, y1 = _read(at_y, yx * width, yy * height, image.shape[0], dense_y)
    columns, rows = _kept(x1 - x0, dense_x), _kept(y1 - y0, dense_y)
    if (rows, columns) == (y1 - y0, x1 - x0):
        pixels = torch.from_numpy(image[y0:y1, x0:x1]).permute(2, 0, 1)
    else:
        pixels = crop_resize(image, (y0, x0, y1 - y0, x1 - x0), (rows, columns), interpolation)
    across, down = columns / (x1 - x0), rows / (y1 - y0)
    of_view = Map((at_x - x0) * across, (at_y - y0) * down, xx * across, xy * across, yx * down, yy * down)
    return affine_sample(pixels, of_view, size, interpolation, ground)


def _kept(pixels: int, density: float) -> int:
    """Return how many of a region's pixels the first resize keeps: all, unless the view shrinks them noticeably.

    Enlarging and shrinking by a few per cent are left to the one interpolation, since a second one would blur.
    """
    return pixels if density > DENSE else math.ceil(pixels * density)


def _read(at: float, along_x: float, along_y: float, length: int, density: float) -> tuple[int, int]:
    """Return which rows or columns of the image a view reads: from the corner `at`, along its two sides; at least one."""
    margin = math.ceil(MARGIN / min(1.0, density))
    low, high = at + min(0.0, along_x) + min(0.0, along_y), at + max(0.0, along_x) + max(0.0, along_y)
    first = min(max(math.floor(low) - margin, 0), length - 1)
    return first, max(min(math.ceil(high) + margin, length), first + 1)


def random_box(
    rng: random.Random, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> Box:
    """Draw the box of Inception's crop (Szegedy et al. 2015), as torchvision's RandomResizedCrop does.

    Area and aspect are drawn until the box fits, at most ten times; after that it is the largest box at the centre.

    Args:
        rng: Source of randomness.
        height: Of the image, in pixels.
        width: Of the image, in pixels.
        scale: Least and largest area of the box, as a fraction of the image's.
        ratio: Least and largest width / height of the box.

    Returns:
        Top, left, height and width of the box in pixels.
    """
    log_ratio = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(*log_ratio))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    aspect = min(max(width / height, ratio[0]), ratio[1])
    h, w = max(1, min(height, round(width / aspect))), max(1, min(width, round(height * aspect)))
    return (height - h) // 2, (width - w) // 2, h, w


def crop_resize(image: Pixels, box: Box, size: tuple[int, int], interpolation: str) -> Tensor:
    """Return a box resized to (3, *size) uint8 in channels-last strides, antialiased as Pillow does it."""
    top, left, height, width = box
    # With a batch dimension added, torch recognises the slice as channels-last, works on it without a copy and returns the
    # same layout.
    crop = torch.from_numpy(image)[None, top : top + height, left : left + width].permute(0, 3, 1, 2)
    if height * size[1] > MAX_SCALED:  # a thin, very high crop: along the columns first
        crop = F.interpolate(crop, (size[0], width), mode=interpolation, antialias=True, align_corners=False)
    return F.interpolate(crop, size, mode=interpolation, antialias=True, align_corners=False)[0]
