"""The choices in decoding an image, as values. Nothing heavy is imported, so configs can name them."""

from dataclasses import dataclass

WHITE = (255, 255, 255)
MAX_PIXELS = 64_000_000  # three bytes each; ImageNet's largest image has a third of it
PILLOW_PIXELS = 178_956_970  # Pillow opens no image with more


@dataclass(frozen=True)
class Decoding:
    """The choices in decoding.

    Attributes:
        ground: Red, green and blue, 0 to 255, behind transparent pixels.
        max_pixels: The most pixels of an image; at most PILLOW_PIXELS.
    """

    ground: tuple[int, int, int] = WHITE
    max_pixels: int = MAX_PIXELS


DEFAULT = Decoding()
