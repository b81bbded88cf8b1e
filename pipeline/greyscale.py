"""Greyscale of more than 8 bits becomes 8 bits, scaled by its range.

16 bits: 0 to 65535 becomes 0 to 255, as viewers show it. For 32 bits and for floats viewers have no rule. Here floats in
[0, 1] and values in [0, 255] keep these ranges. Of all others the least finite value becomes 0 and the greatest 255. What is
not a number becomes 0.
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_PHOTOMETRIC, _SAMPLE_FORMAT = 262, 339  # tags of a TIFF


def to_8_bits(image: Image.Image) -> Image.Image:
    """Scale a loaded image of mode I;16, I or F to mode L, or to LA if the file calls one value transparent."""
    values = np.asarray(image)
    if image.mode.startswith("I;16"):
        scaled = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    else:
        scaled = _scale(values, image)
    if _tag(image, _PHOTOMETRIC, 1) == 0:  # white is zero; Pillow turns only images of 8 bits and fewer round
        scaled = 255 - scaled
    grey = Image.fromarray(scaled)
    transparent = image.info.get("transparency")
    if not isinstance(transparent, int):
        return grey
    return Image.merge("LA", (grey, Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8))))


def _scale(values: NDArray[np.generic], image: Image.Image) -> NDArray[np.uint8]:
    """Scale 32-bit integers or floats to 0 to 255 by the rule above."""
    if image.mode == "I" and _tag(image, _SAMPLE_FORMAT, 0) == 1:  # unsigned
        values = values.view(np.uint32)
    flat, finite = values.reshape(-1), np.isfinite(values.reshape(-1))
    if not finite.any():
        return np.zeros(values.shape, np.uint8)
    low, high = (
        float(flat.min(where=finite, initial=flat[finite][0])),
        float(flat.max(where=finite, initial=flat[finite][0])),
    )
    if image.mode == "F" and low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    elif image.mode == "I" and image.format in ("PPM", "PNG"):
        low, high = 0.0, 65535.0  # Pillow scales these to 16 bits
    elif low >= 0 and high <= 255:
        low, high = 0.0, 255.0
    unit = high / 255 - low / 255  # divided first, since the difference of two floats may overflow
    if not unit > 0:
        return np.zeros(values.shape, np.uint8)
    scaled = np.empty(flat.shape, np.uint8)
    for first in range(0, len(flat), 2**20):  # in pieces: the copy in float64 stays small
        piece = slice(first, first + 2**20)
        levels = np.rint(flat[piece].astype(np.float64) / unit - low / unit)
        scaled[piece] = np.nan_to_num(levels, nan=0.0).clip(0, 255)
    return scaled.reshape(values.shape)


def _tag(image: Image.Image, tag: int, default: int) -> int:
    """Return the number in a tag of a TIFF; `default` if the image is no TIFF."""
    tags = getattr(image, "tag_v2", None)
    if tags is None:
        return default
    value = tags.get(tag, 1)
    return int(value[0] if isinstance(value, tuple) else value)
