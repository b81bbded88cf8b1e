"""Tests of a folder's file system: its renames and its locks."""

import fcntl
import os
import threading
from pathlib import Path

RENAMES = 300


def renames_seen_halfway(folder: Path) -> int:
    """Replace a file many times while it is read, and count how often the reader saw neither the old nor the new text."""
    path, stop, gaps = folder / "target", threading.Event(), 0
    texts = {"a" * 4096, "b" * 4096}
    path.write_text("a" * 4096)

    def replace() -> None:
        for i in range(RENAMES):
            temporary = folder / "temporary"
            temporary.write_text("ab"[i % 2] * 4096)
            os.replace(temporary, path)
        stop.set()

    writer = threading.Thread(target=replace)
    writer.start()
    while not stop.is_set():
        try:
            gaps += path.read_text() not in texts
        except OSError:
            gaps += 1
    writer.join()
    return gaps


def locks(folder: Path) -> bool:
    """Find out whether flock keeps a second process out there."""
    with (folder / "lock").open("w") as mine, (folder / "lock").open("w") as other:
        fcntl.flock(mine, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
