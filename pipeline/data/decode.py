"""Image bytes to pixels, with limits: what does not decode, or would fill the memory, is a sentence."""

import io
import warnings

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from pipeline.errors import DataError

MAX_PIXELS = 64_000_000  # three bytes each; ImageNet's largest image has a third of this

Pixels = NDArray[np.uint8]  # (height, width, 3), RGB


class UnreadableImage(DataError):
    """One sample's bytes are no image within the limits; its neighbours may be fine."""


def decode(data: bytes) -> Pixels:
    """RGB pixels of any image that Pillow reads; UnreadableImage with the reason otherwise."""
    try:
        # Warnings about odd metadata say nothing about the pixels.
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UnreadableImage(f"{image.width} x {image.height} pixels; at most {MAX_PIXELS:,} are decoded")
            return np.asarray(image.convert("RGB"))
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError, SyntaxError, EOFError) as error:
        raise UnreadableImage(f"not a readable image ({type(error).__name__}: {error})") from None
