"""Files and folders that are whole or absent, and their hashes.

A writer fills a temporary path beside the target (`.NAME.tmp`), brings it to the disk and renames it. So a reader sees
the old content or the new content, and a killed process leaves at most the temporary path, which the next writer of
the same target overwrites. Two processes that may write one target at the same time need a lock around the write.
"""

import contextlib
import errno
import hashlib
import os
import platform
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path

# File systems that many nodes share. Programs that are built for one node's CPU, under locks, do not belong there.
NETWORK = re.compile(r"nfs\d?|lustre|gpfs|beegfs\w*|ceph|cifs|smb\d?|afs|panfs|wekafs|9p|fuse\..*|orangefs|pvfs2")


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a regular file as 64 hexadecimal digits.

    Raises:
        OSError: It is absent, or cannot be read, or is no regular file.
    """
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_system(path: Path) -> str:
    """Return the type of the file system of a path, which need not exist; empty if the system does not say."""
    mounts = Path("/proc/mounts")
    lines = mounts.read_text().splitlines() if mounts.exists() else []
    kinds = {Path(line.split()[1]): line.split()[2] for line in lines}  # a later mount covers an earlier one
    real = real_path(path)
    return next((kinds[folder] for folder in (real, *real.parents) if folder in kinds), "")


def node_cache() -> Path:
    """Return a cache folder on a disk of this machine: `user_cache`, unless the home lies on a network.

    Raises:
        OSError: No folder can be used safely.
    """
    folder = user_cache()
    return _temporary_cache() if NETWORK.fullmatch(file_system(folder)) else folder


def user_cache() -> Path:
    """Return this program's folder in the user's cache folder, or in the temporary folder without a home.

    Raises:
        OSError: Neither can be used safely.
    """
    try:
        home = Path.home()
    except RuntimeError:  # HOME is unset, and the user is in no table of users
        return _temporary_cache()
    folder = home / ("Library/Caches" if platform.system() == "Darwin" else ".cache") / "visionmamba-pipeline"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK) and folder.stat().st_uid == os.geteuid():
            return folder
    except OSError:
        pass
    return _temporary_cache()


def _temporary_cache() -> Path:
    """Return a folder that only this user can write to, among everybody's temporary files."""
    folder = Path(tempfile.gettempdir()) / f"visionmamba-pipeline-{os.geteuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise OSError(error.errno, f"neither the home folder nor {folder} can be written: {error.strerror}") from None
    if found.st_uid != os.geteuid() or found.st_mode & 0o022 or folder.is_symlink():
        raise OSError(errno.EPERM, f"{folder} belongs to somebody else, who could put files there")
    return folder


def real_path(path: Path | str) -> Path:
    """Return a path without links, as `Path.resolve` does, but for a loop of links too: as far as it leads."""
    return Path(os.path.realpath(path))


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file for reading, without waiting for a FIFO or a device.

    Raises:
        OSError: It is absent, or cannot be read, or is no regular file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except ValueError as error:  # a NUL or a lone surrogate in the name
        raise OSError(errno.EINVAL, str(error)) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return open(descriptor, "rb")


def read_regular(path: Path) -> bytes:
    """Return the content of a regular file, without waiting for a FIFO or a device.

    Raises:
        OSError: It is absent, or cannot be read, or is no regular file.
    """
    with open_regular(path) as file:
        return file.read()


def replace_text(path: Path, text: str) -> str:
    """Write `text` to `path` in UTF-8, whole or not at all, and return the SHA-256 of the file."""
    return replace_bytes(path, text.encode())


def replace_bytes(path: Path, data: bytes) -> str:
    """Write `data` to `path`, whole or not at all, and return the SHA-256 of the file."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


@contextlib.contextmanager
def replacing(path: Path, *, sync: bool = True) -> Iterator[Path]:
    """Give the block a temporary path to create a file or a folder at; rename it to `path` when the block ends.

    Folders above `path` are made. If the block raises, the temporary path is removed and `path` keeps its content.

    Args:
        path: The file or folder to write. An existing one is replaced.
        sync: Whether all bytes are on the disk before the rename. Caches, which can be filled again, go without.

    Yields:
        A path that does not exist yet, in the same folder as `path`.
    """
    temporary = temporary_of(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove(temporary)
    try:
        yield temporary
        publish(temporary, path, sync=sync)
    finally:
        remove(temporary)


def temporary_of(path: Path) -> Path:
    """Return where the unfinished form of `path` lies: beside it, hidden, and with an ending no pattern matches."""
    return path.with_name(f".{path.name}.tmp")


def publish(temporary: Path, path: Path, *, sync: bool = True) -> None:
    """Rename a finished file or folder to `path`, in place of what was there.

    `replacing` does this for one writer. Writers of several processes fill `temporary_of(path)` together, and one of
    them calls this when all have finished.

    Args:
        temporary: The finished file or folder, in the same folder as `path`.
        path: Its final path.
        sync: Whether its bytes, and then the rename, are on the disk when this returns.
    """
    if sync:
        for written in (temporary, *temporary.rglob("*")):
            _sync(written)
    old = path.with_name(f".{path.name}.old")
    remove(old)
    # A rename replaces a file by a file, and an empty folder by a folder.
    if path.is_dir() or (temporary.is_dir() and os.path.lexists(path)):
        os.replace(path, old)
    os.replace(temporary, path)
    if sync:
        _sync(path.parent)
    remove(old)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there. `shutil.rmtree` alone would wait for a FIFO."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Return when the bytes of a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
