"""One conversion at a time into one folder."""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import EnvironmentProblem

LOCK = ".convert.lock"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Hold the lock of a folder for the block; no file is left behind.

    Yields:
        The descriptor of the lock, which processes forked in the block must close.

    Raises:
        EnvironmentProblem: Another process holds it.
    """
    path = folder / LOCK
    descriptor = _acquire(path)
    try:
        yield descriptor
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _acquire(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):  # a file system without locks
                return descriptor
            os.close(descriptor)
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            raise EnvironmentProblem(
                f"another process is converting into {path.parent}; wait for its end, or give another folder as --out"
            ) from None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        os.close(descriptor)  # the holder before removed this file; take the new one
