"""Coloured letters on photographs as a source: 26 classes of 32 x 32 pixels, made from what installed packages carry.

The images are rendered: a capital in one of the six DejaVu typefaces that matplotlib carries, in a random colour, size,
rotation and place, on a faded crop of one of the two photographs that scikit-learn carries. The dataset complements the
digits with colour, clutter and more classes. A model of 150 thousand weights learns it in a minute on one core; it is no
benchmark of anything else.
"""

import functools
import io
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from pipeline import seeds
from pipeline.datasets import lettering
from pipeline.datasets.convert.source import Source

SIDE = 32  # pixels
FADE = 0.8  # how far the background is faded towards its mean colour, 1 = wholly
CONTRAST = 100  # least difference in lightness between letter and background, of 255
LUMA = np.array([0.299, 0.587, 0.114])  # shares of red, green and blue in lightness
CLASSES = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
FACES = tuple(f"DejaVu{name}.ttf" for name in ("Sans", "Sans-Bold", "Serif", "Serif-Bold", "SansMono", "SansMono-Bold"))
_LETTERS = 31  # stream of random numbers


@dataclass
class Letters(Source):
    """Rendered letters, a `Source`; each is drawn from (seed, key), so any order gives the same images."""

    name: str
    seed: int
    keys: Sequence[str]
    labels: Sequence[int]
    classes: Sequence[str] = field(default=CLASSES)
    in_order: bool = False

    def read(self, item: int) -> tuple[str, bytes]:
        """Return the extension and the PNG bytes of one letter."""
        number = int(self.keys[item].rpartition("-")[2])
        buffer = io.BytesIO()
        Image.fromarray(draw(self.labels[item], random.Random(seeds.fold(self.seed, number, _LETTERS)))).save(
            buffer, "PNG"
        )
        return "png", buffer.getvalue()


def letters(seed: int, train_per_class: int = 200, test_per_class: int = 40) -> tuple[Letters, Letters]:
    """Return train and test, both balanced, without a common image."""
    per_class = train_per_class + test_per_class

    def subset(name: str, begin: int, end: int) -> Letters:
        chosen = [(c, c * per_class + k) for c in range(len(CLASSES)) for k in range(begin, end)]
        keys = [f"letter-{number:05d}" for _, number in chosen]
        return Letters(f"letters, {name}, seed {seed}", seed, keys, [c for c, _ in chosen])

    return subset("train", 0, train_per_class), subset("test", train_per_class, per_class)


def draw(label: int, rng: random.Random) -> NDArray[np.uint8]:
    """Return (SIDE, SIDE, 3) uint8: one letter of class `label`."""
    photograph = rng.choice(_photographs())
    side = rng.randrange(SIDE, 4 * SIDE)
    top, left = (rng.randrange(length - side) for length in photograph.shape[:2])
    crop = np.asarray(
        Image.fromarray(photograph[top : top + side, left : left + side]).resize((SIDE, SIDE)), np.float64
    )
    mean = crop.mean((0, 1))
    ground = mean + (1 - FADE) * (crop - mean)
    # The mask of the letter is larger than the image, so that rotating it cuts nothing off.
    canvas = Image.new("L", (2 * SIDE, 2 * SIDE))
    face = rng.choice(FACES)
    font = lettering.font(rng.randrange(24, 28), face)
    ImageDraw.Draw(canvas).text((SIDE, SIDE), CLASSES[label], fill=255, font=font, anchor="mm")
    turned = canvas.rotate(rng.uniform(-5, 5), Image.Resampling.BICUBIC)
    down, across = (SIDE // 2 + rng.randrange(-1, 2) for _ in range(2))
    mask = turned.crop((across, down, across + SIDE, down + SIDE))
    picture = Image.fromarray(ground.astype(np.uint8))
    picture.paste(_ink(mean, rng), (0, 0), mask)
    return np.asarray(picture)


def _ink(ground: NDArray[np.float64], rng: random.Random) -> tuple[int, int, int]:
    """Draw a random colour that is lighter or darker than the mean colour of the background."""
    while True:
        red, green, blue = (rng.randrange(256) for _ in range(3))
        if abs((np.array([red, green, blue]) - ground) @ LUMA) > CONTRAST:
            return red, green, blue


@functools.cache
def _photographs() -> tuple[NDArray[np.uint8], ...]:
    from sklearn.datasets import load_sample_images

    return tuple(load_sample_images().images)
