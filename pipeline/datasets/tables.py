"""The tables of a manifest on disk: opened without a copy, and checked in one pass, each byte read once.

14 million samples are 336 MB. Hashing and checking piece by piece, while a piece is in the processor's cache, and several
datasets in threads, takes a second on two cores. The names are not needed to train, so they are hashed when they are first
read.
"""

import hashlib
import io
import tokenize
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import DataError
from pipeline.files import replace_bytes, sha256_of

_ROWS = 1 << 15  # in a piece; 0.8 MB


def check_regular(path: Path) -> None:
    """Refuse a file that is missing, or would be waited for, such as a FIFO.

    Raises:
        DataError: It is missing or no regular file.
    """
    if not path.is_file():
        raise DataError(f"{path} is missing or no regular file; convert again or restore it")


def check_content(path: Path, sha256: str) -> None:
    """Refuse a file that is missing or has another content.

    Raises:
        DataError: It is missing, or its SHA-256 differs.
    """
    check_regular(path)
    if sha256_of(path) != sha256:
        raise _changed(path)


# What numpy raises for a damaged header: it parses the header as Python, and tries again as Python 2 wrote it.
_DAMAGED_HEADER = (ValueError, SyntaxError, tokenize.TokenError, RecursionError, MemoryError)


def open_table(path: Path, dtype: np.dtype[np.void], sha256: str) -> NDArray[np.void]:
    """Map a table into memory; only its size and form are checked.

    Raises:
        DataError: The file is missing, or is no such table because it was changed.
    """
    check_regular(path)
    try:
        table: NDArray[np.void] = np.lib.format.open_memmap(path, mode="r")
        whole = table.ndim == 1 and table.dtype == dtype and _start(path, table) >= 0
    except _DAMAGED_HEADER:
        whole = False
    if whole:
        return table
    check_content(path, sha256)
    raise ValueError("a sample table of another form")


def write_table(path: Path, table: NDArray[np.void]) -> str:
    """Write a table, whole or not at all, and return the SHA-256 of its file."""
    buffer = io.BytesIO()
    np.save(buffer, table)
    return replace_bytes(path, buffer.getvalue())


def check_table(
    path: Path,
    table: NDArray[np.void],
    sha256: str,
    sizes: NDArray[np.uint64],
    ends: NDArray[np.int64],
    bounds: tuple[int, int],
) -> str:
    """Read a table once: return what contradicts itself in it; empty if nothing does.

    Args:
        path: Its file.
        table: (num_samples,) the table, as `open_table` returns it.
        sha256: What the file must have.
        sizes: (num_shards,) bytes of each shard.
        ends: (num_shards,) first sample index after each shard.
        bounds: How many bytes the names have, and how many classes there are.

    Raises:
        DataError: The file has another SHA-256.
    """
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(_start(path, table)))
    num_names, num_classes = bounds
    found, before = "", -1
    low, high = 0, -1
    for start in range(0, len(table), _ROWS):
        rows = table[start : start + _ROWS]
        digest.update(rows.view(np.uint8).data)
        first, last = np.searchsorted(ends, [start, start + len(rows) - 1], side="right").tolist()
        stops = np.minimum(ends[first : last + 1], start + len(rows))
        size = np.repeat(sizes[first : last + 1], stops - np.r_[start, stops[:-1]])
        offset, names, labels = rows["offset"], rows["name"].astype(np.int64), rows["label"]
        end = offset + rows["length"]
        if not found and ((outside := end > size) | (end < offset)).any():
            found = f"places sample {start + int(outside.argmax())} outside its shard"
        if not found and (int(names[0]) <= before or (names[1:] <= names[:-1]).any() or int(names[-1]) >= num_names):
            found = "has member names out of order"
        before = int(names[-1])
        low, high = min(low, int(labels.min())), max(high, int(labels.max()))
    if digest.hexdigest() != sha256:
        raise _changed(path)
    if not found and (low < -1 or high >= num_classes):
        found = f"has labels from {low} to {high} for {num_classes} classes"
    return found


def _start(path: Path, table: NDArray[np.void]) -> int:
    """Return where the rows begin in the file; -1 if anything follows them."""
    start = path.stat().st_size - table.nbytes
    return start if isinstance(table, np.memmap) and start == table.offset else -1


def _changed(path: Path) -> DataError:
    return DataError(f"{path} is not the file that manifest.json was written with; convert again or restore it")
