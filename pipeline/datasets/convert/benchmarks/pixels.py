"""Arrays of pixels as a source: every image becomes a lossless PNG."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.datasets.convert.source import Source
from pipeline.errors import DataError


@dataclass
class Pixels(Source):
    """Images of one size that lie in arrays, a `Source`; worker processes share the arrays by fork.

    Attributes:
        parts: Arrays of uint8, each (n, H, W, 3); together one row per sample.
        files: The files that the arrays come from.
    """

    name: str
    classes: Sequence[str]
    keys: Sequence[str]
    labels: Sequence[int]
    parts: Sequence[NDArray[np.uint8]]
    files: Sequence[str]
    in_order: bool = False

    def read(self, item: int) -> tuple[str, bytes]:
        """Return the extension and the PNG bytes of one image."""
        for part in self.parts:
            if item < len(part):
                break
            item -= len(part)
        buffer = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(part[item])).save(buffer, "PNG")
        return "png", buffer.getvalue()


def numbered(name: str, count: int) -> list[str]:
    """Return keys that sort in the order of the file, which USB's index seeds count in."""
    return [f"{name}-{number:06d}" for number in range(count)]


def read_bytes(path: Path, most: int = 2**30) -> bytes:
    """Read a whole file of a benchmark.

    Raises:
        DataError: It is missing, cannot be read, or is larger than any file of these benchmarks.
    """
    try:
        if path.exists() and not path.is_file():  # a FIFO would block for ever
            raise DataError(f"{path} is no file; unpack the benchmark's archive again")
        size = path.stat().st_size
        if size > most:
            raise DataError(f"{path} has {size:,} bytes, at most {most:,} are read; it is no file of this benchmark")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); unpack the benchmark's archive again") from None


def check_labels(labels: NDArray[np.int64], classes: int, path: Path) -> list[int]:
    """Return the labels as a list.

    Raises:
        DataError: A label is outside of 0 to `classes` - 1.
    """
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise DataError(
            f"{path} has labels {int(labels.min())} to {int(labels.max())} for {classes} classes; it is damaged: unpack the"
            " benchmark's archive again"
        )
    return [int(label) for label in labels]
