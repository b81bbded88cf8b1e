"""SVHN's cropped digits as sources, from MATLAB files of version 5 to 7."""

from pathlib import Path

import numpy as np

from pipeline.datasets.convert.benchmarks.pixels import Pixels, check_labels, numbered
from pipeline.errors import DataError, first_line

CLASSES = tuple("0123456789")
_MOST = 2_000_000  # images of one file; SVHN's largest has 531,131
_AGAIN = "download the file again"


def svhn(root: Path, extra: bool) -> tuple[Pixels, Pixels]:
    """Return train and test.

    Args:
        root: Folder of train_32x32.mat and test_32x32.mat.
        extra: Whether train also has the 531,131 images of extra_32x32.mat.

    Raises:
        DataError: A file is missing, damaged, or of MATLAB 7.3.
    """
    train = [root / "train_32x32.mat", *([root / "extra_32x32.mat"] if extra else [])]
    return _source(root, "train", train), _source(root, "test", [root / "test_32x32.mat"])


def _source(root: Path, part: str, paths: list[Path]) -> Pixels:
    images, labels = zip(*map(_read, paths), strict=True)
    known = [label for path, found in zip(paths, labels, strict=True) for label in check_labels(found, 10, path)]
    keys = [
        key for path, found in zip(paths, labels, strict=True) for key in numbered(path.name[:5].strip("_"), len(found))
    ]
    return Pixels(f"{root}, {part}", CLASSES, keys, known, images, [str(path) for path in paths])


def _read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return images (n, 32, 32, 3) and labels (n,); the file writes the digit 0 as 10."""
    from scipy.io import loadmat, whosmat

    try:
        if path.exists() and not path.is_file():  # a FIFO would block for ever
            raise DataError(f"{path} is no file; {_AGAIN}")
        with path.open("rb") as file:
            start = file.read(128)
        if start.startswith(b"\x89HDF") or b"MATLAB 7.3" in start:
            raise DataError(f"{path} has MATLAB's format 7.3, which is not read; save it with -v7, or {_AGAIN}")
        # MATLAB 4 has no such mark, and states the lengths of its names unchecked.
        if start[126:128] not in (b"IM", b"MI"):
            raise DataError(f"{path} is no MATLAB file of version 5 to 7; {_AGAIN}")
        # Shapes first, since a small file can claim a huge array.
        shapes = {name: (shape, kind) for name, shape, kind in whosmat(str(path))}
        (shape, kind), (rows, _) = shapes.get("X", ((), "")), shapes.get("y", ((), ""))
        if shape[:3] != (32, 32, 3) or kind != "uint8" or len(shape) != 4 or not 1 <= shape[3] <= _MOST:
            raise DataError(f"{path} has no X of 32 x 32 x 3 x n bytes, but {kind or 'nothing'} {shape}; {_AGAIN}")
        if int(np.prod(rows)) != shape[3]:
            raise DataError(f"{path} has labels of the shape {rows} for {shape[3]} images; {_AGAIN}")
        found = loadmat(str(path), variable_names=["X", "y"])
        images, labels = found["X"], found["y"].astype(np.int64).ravel()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}); {_AGAIN}") from None
    except DataError:
        raise
    except Exception as error:  # damaged bytes raise errors of many classes
        raise DataError(f"{path} is damaged ({first_line(error, 100)}); {_AGAIN}") from None
    return images.transpose(3, 0, 1, 2), np.where(labels == 10, 0, np.where(labels == 0, -1, labels))
