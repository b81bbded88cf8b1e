"""The digits that scikit-learn carries, as a source: real scans, small enough for tests and the demo."""

import io
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline import seeds
from pipeline.datasets.convert.source import Source


@dataclass
class Digits(Source):
    """Some of scikit-learn's 1797 scanned digits as lossless PNG, a `Source`.

    Attributes:
        items: (N,) their numbers in `load_digits()`.
        images: (N, 8, 8) grey levels.
    """

    name: str
    items: NDArray[np.int64]
    images: NDArray[np.uint8]
    labels: Sequence[int]
    keys: Sequence[str]
    classes: Sequence[str] = field(default=tuple("0123456789"))
    in_order: bool = False

    def read(self, item: int) -> tuple[str, bytes]:
        """Return the extension and the PNG bytes of one digit."""
        buffer = io.BytesIO()
        Image.fromarray(self.images[item]).save(buffer, "PNG")
        return "png", buffer.getvalue()


def digits(seed: int, test_per_class: int = 40) -> tuple[Digits, Digits]:
    """Return train and test; the test set is balanced and drawn with `seed`."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    labels = bunch.target
    test = []
    for c in range(10):
        members = np.flatnonzero(labels == c)
        test.append(members[seeds.permutation(len(members), seed, c)[:test_per_class]])
    held_out = np.sort(np.concatenate(test))
    rest = np.setdiff1d(np.arange(len(labels)), held_out)

    def subset(name: str, items: NDArray[np.int64]) -> Digits:
        keys = [f"digit-{item:04d}" for item in items]
        return Digits(f"digits, {name}, seed {seed}", items, images[items], labels[items].tolist(), keys)

    return subset("train", rest), subset("test", held_out)
