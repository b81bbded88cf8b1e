"""One process at a time: a lock that the system gives back when its holder dies."""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import EnvironmentProblem


@contextlib.contextmanager
def locked(path: Path, busy: str) -> Iterator[int]:
    """Hold a lock for the block; its file is not left behind. A file system without locks gives every process one.

    Args:
        path: The file of the lock, in a folder that is there.
        busy: What the refusal says.

    Yields:
        The descriptor of the lock, which processes forked in the block must close.

    Raises:
        EnvironmentProblem: Another process holds it.
    """
    descriptor = _acquire(path, busy)
    try:
        yield descriptor
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _acquire(path: Path, busy: str) -> int:
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
            raise EnvironmentProblem(busy) from None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        os.close(descriptor)  # the holder before removed this file; take the new one
