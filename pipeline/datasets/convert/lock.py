"""One conversion at a time into one folder."""

from contextlib import AbstractContextManager
from pathlib import Path

from pipeline.locks import locked

LOCK = ".convert.lock"


def converting(folder: Path) -> AbstractContextManager[int]:
    """Hold the lock of a folder for the block, as `pipeline.locks.locked` does."""
    busy = f"another process is converting into {folder}; wait for its end, or give another folder as --out"
    return locked(folder / LOCK, busy)
