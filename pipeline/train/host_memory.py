"""How a training process treats the host's memory: it keeps what it frees, and does not search old objects for garbage."""

import ctypes
import gc
import platform
from collections.abc import Iterator
from contextlib import contextmanager

# glibc's malloc.h. Version 2.33 and older take 32 MiB at most, the others any number.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST, _ALLOWED = 2**30, 2**25


def keep_freed() -> bool:
    """Let this process keep the memory that it frees, where the C library is glibc.

    A step on a CPU allocates its activations and frees them. glibc returns freed memory to the system, which then has to clear
    its pages anew: about 10 % of a Vim-Small's step. The process grows to the most that it ever needed and a few percent more.

    Returns:
        Whether it keeps it.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    set_option = ctypes.CDLL(None).mallopt
    kept = any(set_option(_MMAP_THRESHOLD, size) for size in (_LARGEST, _ALLOWED))
    return bool(kept and set_option(_TRIM_THRESHOLD, 2**31 - 1))


@contextmanager
def without_old_objects() -> Iterator[None]:
    """Keep Python's garbage collector away from all objects that exist now.

    They are hundreds of thousands: modules, classes, the model. A search through them takes a tenth of a second, on each rank at
    another step, while all others wait for it.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
