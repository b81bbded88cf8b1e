"""STL-10 as sources, from its binary files: 5,000 labelled and 100,000 unlabelled images of 96 x 96 pixels, and a test set."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.datasets.convert.benchmarks.pixels import Pixels, check_labels, numbered, read_bytes
from pipeline.errors import DataError

SIDE = 96
FOLDER = "stl10_binary"


def stl10(root: Path) -> tuple[Pixels, Pixels]:
    """Return train, whose unlabelled images have no label, and test.

    Args:
        root: The folder of train_X.bin and the others, or the one that holds `stl10_binary`.

    Raises:
        DataError: A file is missing or damaged.
    """
    folder = root if (root / "train_X.bin").is_file() else root / FOLDER
    if not (folder / "train_X.bin").is_file():
        raise DataError(f"{root} has no train_X.bin; unpack STL-10's archive (stl10_binary.tar.gz) there")
    classes = read_bytes(folder / "class_names.txt", 2**20).decode("utf-8", "replace").split()
    if len(set(classes)) != 10:
        raise DataError(
            f"{folder / 'class_names.txt'} names {len(set(classes))} classes, not 10; unpack the archive again"
        )
    subsets = {}
    for part in ("train", "test"):
        images = _images(folder / f"{part}_X.bin")
        given = np.frombuffer(read_bytes(folder / f"{part}_y.bin"), np.uint8).astype(np.int64) - 1
        if len(given) != len(images):
            raise DataError(
                f"{folder}: {part}_y.bin has {len(given)} labels for the {len(images)} images of {part}_X.bin; unpack the"
                " archive again"
            )
        subsets[part] = images, check_labels(given, 10, folder / f"{part}_y.bin")
    unlabelled = _images(folder / "unlabeled_X.bin")
    images, labels = subsets["train"]
    train = Pixels(
        f"{folder}, train",
        classes,
        numbered("train", len(images)) + numbered("unlabelled", len(unlabelled)),
        labels + [-1] * len(unlabelled),
        [images, unlabelled],
        [str(folder / name) for name in ("train_X.bin", "train_y.bin", "unlabeled_X.bin")],
    )
    images, labels = subsets["test"]
    files = [str(folder / name) for name in ("test_X.bin", "test_y.bin")]
    return train, Pixels(f"{folder}, test", classes, numbered("test", len(images)), labels, [images], files)


def _images(path: Path) -> NDArray[np.uint8]:
    """Map a file of images, which are stored by colour, column and row: (n, 96, 96, 3). 2.8 GB need no memory of their own."""
    record = 3 * SIDE * SIDE
    try:
        size = path.stat().st_size
        if not size or size % record:
            raise DataError(f"{path} has {size:,} bytes, no multiple of {record} per image; unpack the archive again")
        stored = np.memmap(path, np.uint8, "r", shape=(size // record, 3, SIDE, SIDE))
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); unpack STL-10's archive again") from None
    return stored.transpose(0, 3, 2, 1)
