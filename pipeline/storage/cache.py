"""A size-limited folder of byte ranges, shared by all processes of a node.

The first process that gets the lock of a range fetches it, writes it to a temporary file and renames it. So a range is
complete or absent, and is fetched once. A process that dies blocks nobody, because the kernel releases its lock. The
least recently used ranges are deleted first; a process that reads one can read it to the end.
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
# A process sums up the sizes again after it has added this share of the limit; by as much it can exceed the limit.
CHECK_FRACTION = 1 / 64


class Cache:
    """Files by name in one folder.

    Args:
        folder: The folder; it is created if it does not exist.
        limit: Size limit of all files together, in bytes.

    Raises:
        DataError: If the folder cannot be created.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self._unchecked = 0
        try:
            (folder / "locks").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(
                f"the cache folder {folder} cannot be created ({error.strerror}); set remote.cache to another folder"
            ) from None

    def open(self, name: str, size: int, fetch: Callable[[BinaryIO], None]) -> int:
        """Open a file for reading, after fetching it if it is absent or has another size.

        Args:
            name: The name of the file in the folder.
            size: Its size in bytes.
            fetch: Writes its content to the given file.

        Returns:
            A file descriptor, which the caller closes.

        Raises:
            DataError: If the file cannot be written, or whatever `fetch` raises.
        """
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
    """Return a descriptor of a complete file and mark it as just used; None if there is no complete file."""
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
        raise DataError(
            f"the cache {path.parent} cannot be written ({error.strerror}); free space or lower remote.cache_gb"
        ) from None
    return os.open(path, os.O_RDONLY)
