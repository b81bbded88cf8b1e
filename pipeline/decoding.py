"""The choices in decoding an image, as values. Nothing heavy is imported, so configs can name them."""

import argparse
from dataclasses import dataclass, replace

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


def add_options(parser: argparse.ArgumentParser, ground: str) -> None:
    """Give a command the options --ground and --max-pixels; `ground` says in words what its default is."""
    parser.add_argument(
        "--ground",
        type=_colour,
        metavar="R,G,B",
        help=f"red, green and blue, 0 to 255, behind transparent pixels (default: {ground})",
    )
    add_max_pixels(parser)


def add_max_pixels(parser: argparse.ArgumentParser) -> None:
    """Give a command the option --max-pixels; None = MAX_PIXELS."""
    parser.add_argument(
        "--max-pixels",
        type=_pixels,
        metavar="N",
        help=f"most pixels of an image, at most {PILLOW_PIXELS}; a larger JPEG is decoded at a reduced scale"
        f" (default {MAX_PIXELS})",
    )


def given(options: argparse.Namespace, default: Decoding = DEFAULT) -> Decoding:
    """Return the choices of `add_options`, and those of `default` where none was given."""
    ground = default.ground if options.ground is None else options.ground
    return replace(default, ground=ground, max_pixels=options.max_pixels or default.max_pixels)


def _colour(text: str) -> tuple[int, int, int]:
    levels = text.split(",")
    if len(levels) != 3 or not all(level.strip().isdigit() and int(level) <= 255 for level in levels):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no colour; give red, green and blue from 0 to 255, such as 255,255,255"
        )
    red, green, blue = map(int, levels)
    return red, green, blue


def _pixels(text: str) -> int:
    if not text.isdigit() or not 0 < int(text) <= PILLOW_PIXELS:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 to {PILLOW_PIXELS}")
    return int(text)
