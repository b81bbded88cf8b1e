"""Text on pictures, in matplotlib's fonts.

Pillow's own font draws few letters beyond ASCII; matplotlib's lack Chinese, Japanese and Indian ones.
"""

import functools
from pathlib import Path

from PIL import ImageFont


@functools.cache
def font(size: int, name: str = "DejaVuSans.ttf") -> ImageFont.FreeTypeFont:
    """Return a font.

    Args:
        size: Height of a line in pixels.
        name: A file of matplotlib's fonts.
    """
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, size)


def fitted(text: str, size: int, width: int) -> str:
    """Cut a text that is wider than `width` pixels in `font(size)`, with an ellipsis for what is left out."""
    of = font(size)
    if of.getlength(text) <= width:
        return text
    while text and of.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text.rstrip()}…"
