"""A folder of byte ranges, shared by all processes of a node, within a size limit.

A range is fetched by whoever first holds its lock, written aside and renamed: so it is complete or absent, fetched
once, and a process that dies leaves nothing that blocks (the kernel releases its lock). Ranges used longest ago go
first; one that is still being read stays readable until it is closed.
"""

import contextlib
import fcntl
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from pipeline.errors import DataError
from pipeline.files import replacing

NUM_LOCKS = 256
# Sizes are summed up again after so much of the limit was added; by this the limit may be passed, per process.
CHECK_FRACTION = 1 / 64


class Cache:
    """Files by name in `folder`, up to `limit` bytes together."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self._unchecked = 0
        try:
            (folder / "locks").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"cache folder {folder} cannot be made ({error.strerror}); choose another") from None

    def open(self, name: str, size: int, fetch: Callable[[BinaryIO], None]) -> int:
        """A descriptor of the file `name`, which `fetch` writes if it is not there with `size` bytes."""
        path = self.folder / name
        descriptor = _open_whole(path, size)
        if descriptor is None:
            with self._lock(str(zlib.crc32(name.encode()) % NUM_LOCKS)):
                descriptor = _open_whole(path, size)
                if descriptor is None:
                    self._make_room(size)
                    descriptor = _write(path, fetch)
        return descriptor

    def _make_room(self, size: int) -> None:
        self._unchecked += size
        if self._unchecked < self.limit * CHECK_FRACTION:
            return
        self._unchecked = 0
        with self._lock("evict"):
            found = []
            for entry in os.scandir(self.folder):
                with contextlib.suppress(FileNotFoundError):
                    if entry.is_file():
                        found.append((entry.stat().st_mtime_ns, entry.stat().st_size, entry.path))
            excess = sum(size for _, size, _ in found) + size - self.limit
            for _, freed, path in sorted(found):
                if excess <= 0:
                    break
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
                excess -= freed

    @contextlib.contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        with (self.folder / "locks" / name).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _open_whole(path: Path, size: int) -> int | None:
    """A descriptor of a complete file, marked as just used; None if there is none."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    if os.fstat(descriptor).st_size != size:
        os.close(descriptor)
        return None
    os.utime(descriptor)
    return descriptor


def _write(path: Path, fetch: Callable[[BinaryIO], None]) -> int:
    try:
        with replacing(path, sync=False) as temporary, temporary.open("wb") as file:
            fetch(file)
    except OSError as error:
        raise DataError(f"cache {path.parent}: {error.strerror}; free space or lower remote.cache_gb") from None
    return os.open(path, os.O_RDONLY)
