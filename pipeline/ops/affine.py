"""A small view of an image under an affine map: a compiled kernel, since torch needs a dozen calls for each image."""

import ctypes
import functools
from ctypes import POINTER, c_double, c_float, c_int64, c_void_p
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.ops.native.build import optional_library


class Map(NamedTuple):
    """From a view into an image: where the view's corner lies, and what a step along x or y of the view adds.

    All in pixels of the image, whose first pixel goes from 0 to 1.
    """

    x: float
    y: float
    xx: float
    xy: float
    yx: float
    yy: float


def affine_sample(
    pixels: Tensor, of_view: Map, size: tuple[int, int], interpolation: str, ground: tuple[int, ...]
) -> Tensor:
    """Return the (3, H, W) uint8 view of an image, interpolated without antialiasing, on the processor.

    The compiled kernel and torch differ by one level where a value lies half-way between two.

    Args:
        pixels: (3, rows, columns) uint8, with any strides.
        of_view: The map.
        size: H, W.
        interpolation: "bilinear" or "bicubic".
        ground: Red, green and blue of points outside the image.
    """
    kernels = compiled()
    if kernels is None:
        return _by_torch(pixels, of_view, size, interpolation, ground)
    view = torch.empty((3, *size), dtype=torch.uint8)
    (channel, row, column), (_, rows, columns) = pixels.stride(), pixels.shape
    shape = (c_int64 * 5)(rows, columns, row, column, channel)
    bicubic = interpolation == "bicubic"
    colour = (c_float * 3)(*ground)
    kernels.affine_sample(pixels.data_ptr(), shape, (c_double * 6)(*of_view), colour, bicubic, view.data_ptr(), *size)
    return view


def _by_torch(
    pixels: Tensor, of_view: Map, size: tuple[int, int], interpolation: str, ground: tuple[int, ...]
) -> Tensor:
    (height, width), (_, rows, columns) = size, pixels.shape
    x, y, xx, xy, yx, yy = of_view
    # grid_sample's coordinates go from -1 to 1 over the sides of the view and of the image.
    middle_x, middle_y = x + (xx * width + xy * height) / 2, y + (yx * width + yy * height) / 2
    matrix = torch.tensor(
        [
            [
                [xx * width / columns, xy * height / columns, 2 * middle_x / columns - 1],
                [yx * width / rows, yy * height / rows, 2 * middle_y / rows - 1],
            ]
        ]
    )
    grid = F.affine_grid(matrix, [1, 3, height, width], align_corners=False)
    colour = torch.tensor(ground, dtype=torch.float32)[:, None, None]
    # Outside the pixels grid_sample reads zeros, which become the ground. Pillow's transform was slower.
    view = F.grid_sample((pixels - colour)[None], grid, interpolation, padding_mode="zeros", align_corners=False)[0]
    return view.add_(colour).round_().clamp_(0, 255).to(torch.uint8)


@functools.cache
def compiled() -> ctypes.CDLL | None:
    """Return the compiled kernels, or None where there is no compiler; call it before data workers start."""
    library = optional_library("views under affine maps")
    if library is None:
        return None
    library.affine_sample.argtypes = [
        *(c_void_p, POINTER(c_int64), POINTER(c_double), POINTER(c_float), c_int64),
        *(c_void_p, c_int64, c_int64),
    ]
    library.affine_sample.restype = None
    return library
