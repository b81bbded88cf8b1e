"""Where images come from before they are shards: classes, a key and a label for each, and its bytes."""

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.datasets.tars import IMAGE_EXTENSIONS
from pipeline.errors import DataError


class Source(Protocol):
    """Images to convert. Crosses to worker processes by fork, so it may hold arrays but no open files."""

    name: str  # for people
    classes: Sequence[str]
    keys: Sequence[str]  # unique, without dots in the last part: WebDataset ends a key there
    labels: Sequence[int]  # -1 where unknown
    in_order: bool  # whether reading in any other order is slow; if not, conversion shuffles

    def read(self, item: int) -> tuple[str, bytes]:
        """The file extension and the bytes of keys[item]."""


@dataclass
class Files:
    """Image files on disk."""

    name: str
    classes: Sequence[str]
    keys: Sequence[str]
    labels: Sequence[int]
    paths: Sequence[str]
    in_order: bool = False

    def read(self, item: int) -> tuple[str, bytes]:
        path = self.paths[item]
        try:
            with open(path, "rb") as file:
                return Path(path).suffix[1:].lower(), file.read()
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror})") from None


def image_folder(root: Path) -> Files:
    """One folder per class, as torchvision's ImageFolder: classes sorted by name; images at any depth below."""
    if not root.is_dir():
        raise DataError(f"{root} is not a folder; give the one that holds a folder per class")
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    names, labels = [], []
    for label, name in enumerate(classes):
        found = images_below(root / name)
        if not found:
            raise DataError(f"class folder {root / name} has no images ({', '.join(IMAGE_EXTENSIONS)}); remove it")
        names += [f"{name}/{image}" for image in found]
        labels += [label] * len(found)
    if not names:
        raise DataError(f"{root} has no class folders with images; expected {root}/CLASS/IMAGE.jpg")
    return Files(str(root), classes, keys_of(names), labels, [str(root / name) for name in names])


def images_below(folder: Path) -> list[str]:
    """Paths of images relative to `folder`, sorted."""
    suffixes = tuple("." + extension for extension in IMAGE_EXTENSIONS)
    found = []
    for parent, _, files in os.walk(folder):
        prefix = "" if parent == str(folder) else os.path.relpath(parent, folder) + "/"
        found += [prefix + file for file in files if file.lower().endswith(suffixes)]
    return sorted(found)


def keys_of(names: Sequence[str]) -> list[str]:
    """Names without their suffix and further dots; DataError if two become the same."""
    keys = []
    for name in names:
        folder, slash, file = name.rpartition("/")
        keys.append(folder + slash + file.rpartition(".")[0].replace(".", "_"))
    if len(set(keys)) < len(keys):
        first: dict[str, str] = {}
        for key, name in zip(keys, names, strict=True):
            if first.setdefault(key, name) != name:
                raise DataError(f"{first[key]} and {name} would both be sample {key!r}; rename one")
    return keys


@dataclass
class Digits:
    """Some of scikit-learn's 1797 scanned digits, 8 x 8 grey levels, as lossless PNG."""

    name: str
    items: NDArray[np.int64]  # indices into load_digits()
    images: NDArray[np.uint8]
    labels: Sequence[int]
    keys: Sequence[str]
    classes: Sequence[str] = field(default=tuple("0123456789"))
    in_order: bool = False

    def read(self, item: int) -> tuple[str, bytes]:
        from PIL import Image

        buffer = io.BytesIO()
        Image.fromarray(self.images[item]).save(buffer, "PNG")
        return "png", buffer.getvalue()


def digits(seed: int, test_per_class: int = 40) -> tuple[Digits, Digits]:
    """Train and test; the test set is balanced and drawn with `seed`."""
    from sklearn.datasets import load_digits

    from pipeline import seeds

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
