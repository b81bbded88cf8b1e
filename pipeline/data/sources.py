"""Where images come from before they are shards: classes, a key and a label for each, and its bytes."""

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Source(Protocol):
    """Images to convert. Crosses to worker processes by fork, so it may hold arrays but no open files."""

    name: str  # for people
    classes: Sequence[str]
    keys: Sequence[str]  # unique, without dots: WebDataset ends a key at the first one
    labels: Sequence[int]  # -1 where unknown

    def read(self, item: int) -> tuple[str, bytes]:
        """The file extension and the bytes of keys[item]."""


@dataclass
class Digits:
    """Some of scikit-learn's 1797 scanned digits, 8 x 8 grey levels, as lossless PNG."""

    name: str
    items: NDArray[np.int64]  # indices into load_digits()
    images: NDArray[np.uint8]
    labels: Sequence[int]
    keys: Sequence[str]
    classes: Sequence[str] = field(default=tuple("0123456789"))

    def read(self, item: int) -> tuple[str, bytes]:
        from PIL import Image

        buffer = io.BytesIO()
        Image.fromarray(self.images[item]).save(buffer, "PNG")
        return "png", buffer.getvalue()


def digits(seed: int, test_per_class: int = 40) -> tuple[Digits, Digits]:
    """Train and test; the test set is balanced and drawn with `seed`."""
    from sklearn.datasets import load_digits

    from pipeline.data import seeds

    bunch = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    labels = bunch.target
    test = []
    for c in range(10):
        members = np.flatnonzero(labels == c)
        test.append(members[seeds.permutation(len(members), seed, c)[:test_per_class]])
    held_out = np.sort(np.concatenate(test))
    rest = np.setdiff1d(np.arange(len(labels)), held_out)

    def part(name: str, items: NDArray[np.int64]) -> Digits:
        keys = [f"digit-{item:04d}" for item in items]
        return Digits(f"digits, {name} part, seed {seed}", items, images[items], labels[items].tolist(), keys)

    return part("train", rest), part("test", held_out)
