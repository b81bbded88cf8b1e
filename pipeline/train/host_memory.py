"""How a training process treats the host's memory: it keeps what it frees, and does not search old objects for garbage."""

import ctypes
import gc
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager

# Numbers of options in glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
# Blocks from this size on are always returned. glibc 2.34 and older refuse more than the second number.
_WANTED, _MOST_OF_OLD_GLIBC = 2**30, 2**25
_NEVER = -1


def keep_freed() -> bool:
    """Let this process keep the memory that it frees, in blocks below 1 GiB, where the C library is glibc.

    A step on a CPU allocates its activations and frees them. glibc returns freed memory to the system, which then has to clear
    its pages anew: 10 % of a step of Vim-Small on a Zen 5. In return the process holds the most that it ever needed
    (docs/engine.md, "Host memory"). Options of the user's own, in MALLOC_* or GLIBC_TUNABLES, have priority.

    Returns:
        Whether the options were set.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return False
    if platform.libc_ver()[0] != "glibc":
        return False
    set_option = ctypes.CDLL(None).mallopt
    kept = any(set_option(_MMAP_THRESHOLD, size) for size in (_WANTED, _MOST_OF_OLD_GLIBC))
    return bool(kept and set_option(_TRIM_THRESHOLD, _NEVER))


@contextmanager
def old_objects_unsearched() -> Iterator[None]:
    """Keep Python's garbage collector away from all objects that exist now, until the block ends.

    They are hundreds of thousands: modules, classes, the model. A search through them takes 0.1 to 0.2 s. Each rank would do so
    at another step, and all others would wait. One block must not be inside another: the end of the inner would end both.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
