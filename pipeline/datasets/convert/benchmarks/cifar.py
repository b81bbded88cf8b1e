"""CIFAR-10 and CIFAR-100 as sources, from the files of their python version or of their binary version."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.datasets.convert.benchmarks.pickles import read_pickle
from pipeline.datasets.convert.benchmarks.pixels import Pixels, check_labels, numbered, read_bytes
from pipeline.errors import DataError

SIDE, PIXELS = 32, 3 * 32 * 32


@dataclass(frozen=True)
class _Layout:
    """Where one version of one benchmark has what.

    Attributes:
        folder: What its archive unpacks to.
        train: Names of the training files, in their order.
        test: Name of the test file.
        names: File of the class names.
        label: Entry of the labels in a python batch; offset of the label's byte in a binary record.
        entry: Entry of the class names in a python file.
        prefix: Bytes before the pixels of a binary record; 0 = the python version.
    """

    folder: str
    train: tuple[str, ...]
    test: str
    names: str
    classes: int
    label: str | int
    entry: str = ""
    prefix: int = 0


_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
_LAYOUTS = (
    _Layout("cifar-10-batches-py", _BATCHES, "test_batch", "batches.meta", 10, "labels", "label_names"),
    _Layout(
        "cifar-10-batches-bin",
        tuple(f"{b}.bin" for b in _BATCHES),
        "test_batch.bin",
        "batches.meta.txt",
        10,
        0,
        prefix=1,
    ),
    _Layout("cifar-100-python", ("train",), "test", "meta", 100, "fine_labels", "fine_label_names"),
    _Layout("cifar-100-binary", ("train.bin",), "test.bin", "fine_label_names.txt", 100, 1, prefix=2),
)


def cifar(root: Path) -> tuple[Pixels, Pixels]:
    """Return train and test of the version that lies in `root`, or in the folder that its archive unpacks to.

    Raises:
        DataError: No version lies there, or a file of it is missing or damaged.
    """
    folder, layout = _find(root)
    classes = _class_names(folder / layout.names, layout)
    return tuple(
        _source(folder, part, names, layout, classes)
        for part, names in (("train", layout.train), ("test", (layout.test,)))
    )  # type: ignore[return-value]


def _find(root: Path) -> tuple[Path, _Layout]:
    for layout in _LAYOUTS:
        for folder in (root, root / layout.folder):
            # CIFAR-100's file is called `train`, as many folders are.
            if (folder / layout.train[0]).is_file():
                return folder, layout
    known = ", ".join(f"{layout.folder}/{layout.train[0]}" for layout in _LAYOUTS)
    raise DataError(f"{root} has no files of CIFAR; unpack its archive there, so that one of these exists: {known}")


def _class_names(path: Path, layout: _Layout) -> list[str]:
    if layout.prefix:
        names = read_bytes(path, 2**20).decode("utf-8", "replace").split()
    else:
        found = read_pickle(path).get(layout.entry)
        names = [str(name) for name in found] if isinstance(found, list) else []
    if len(names) != layout.classes or len(set(names)) != len(names):
        raise DataError(
            f"{path} has {len(set(names))} class names, not {layout.classes}; it is damaged: unpack the archive again"
        )
    return names


def _source(root: Path, part: str, names: tuple[str, ...], layout: _Layout, classes: list[str]) -> Pixels:
    paths = [root / name for name in names]
    read = _binary if layout.prefix else _python
    images, labels = zip(*(read(path, layout) for path in paths), strict=True)
    rows = [image.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1) for image in images]
    known = [
        label for path, found in zip(paths, labels, strict=True) for label in check_labels(found, layout.classes, path)
    ]
    return Pixels(f"{root}, {part}", classes, numbered(part, len(known)), known, rows, [str(path) for path in paths])


def _python(path: Path, layout: _Layout) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    batch = read_pickle(path)
    data, labels = batch.get("data"), batch.get(str(layout.label))
    if not isinstance(data, np.ndarray) or data.ndim != 2 or data.shape[1] != PIXELS:
        raise DataError(
            f"{path} has no table `data` of {PIXELS} bytes per image; it is damaged: unpack the archive again"
        )
    if not isinstance(labels, list) or len(labels) != len(data) or not all(type(label) is int for label in labels):
        raise DataError(
            f"{path} has no list `{layout.label}` of {len(data)} numbers; it is damaged: unpack the archive again"
        )
    # A number beyond 64 bits would not fit; no class has one.
    return data, np.array([label if abs(label) < 2**31 else -1 for label in labels], np.int64)


def _binary(path: Path, layout: _Layout) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    data, record = read_bytes(path), layout.prefix + PIXELS
    if not data or len(data) % record:
        raise DataError(
            f"{path} has {len(data):,} bytes, no multiple of {record} per image; it is damaged: unpack the archive again"
        )
    table = np.frombuffer(data, np.uint8).reshape(-1, record)
    return table[:, layout.prefix :], table[:, int(layout.label)].astype(np.int64)
