"""The digits that scikit-learn carries, as a source: real scans, small enough for tests and the demo."""

import importlib.util
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline import seeds
from pipeline.datasets.convert.source import Source
from pipeline.errors import EnvironmentProblem


@dataclass
class Digits(Source):
    """Some of scikit-learn's 1797 scanned digits as lossless PNG, a `Source`.

    Attributes:
        items: (N,) their numbers in `load_digits()`.
        encoded: The PNG bytes of each of them.
    """

    name: str
    items: NDArray[np.int64]
    encoded: Sequence[bytes]
    labels: Sequence[int]
    keys: Sequence[str]
    classes: Sequence[str] = field(default=tuple("0123456789"))
    in_order: bool = False

    def read(self, item: int) -> tuple[str, bytes]:
        """Return the extension and the PNG bytes of one digit."""
        return "png", self.encoded[item]


def digits(seed: int, test_per_class: int = 40) -> tuple[Digits, Digits]:
    """Return train and test; the test set is balanced and drawn with `seed`."""
    images, labels = _bundled()
    test = []
    for c in range(10):
        members = np.flatnonzero(labels == c)
        test.append(members[seeds.permutation(len(members), seed, c)[:test_per_class]])
    held_out = np.sort(np.concatenate(test))
    rest = np.setdiff1d(np.arange(len(labels)), held_out)

    def subset(name: str, items: NDArray[np.int64]) -> Digits:
        keys = [f"digit-{item:04d}" for item in items]
        encoded = [_png(image) for image in images[items]]
        return Digits(f"digits, {name}, seed {seed}", items, encoded, labels[items].tolist(), keys)

    return subset("train", rest), subset("test", held_out)


def _bundled() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Read what `load_digits()` gives, (N, 8, 8) grey levels and (N,) classes, from its file.

    Importing scikit-learn takes longer than the whole conversion.
    """
    package = importlib.util.find_spec("sklearn")
    if package is None or not package.submodule_search_locations:
        raise EnvironmentProblem("scikit-learn, which carries the digits, is not installed; type `make install`")
    table = np.loadtxt(Path(package.submodule_search_locations[0]) / "datasets/data/digits.csv.gz", delimiter=",")
    images = np.rint(table[:, :-1] * (255 / 16)).astype(np.uint8)
    return images.reshape(-1, 8, 8), table[:, -1].astype(np.int64)


def _png(image: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()
