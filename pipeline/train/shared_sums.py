"""Sums over the ranks of one machine through memory that they share, in microseconds where gloo takes hundreds.

gloo sends even a few numbers through sockets and two threads of its own, which wait for a core on a machine that trains on all of
them: on two cores a sum of 64 numbers takes 0.3 ms, and 4 ms in one case of ten. A network with synchronised batch norms, which
sum in each direction, trained four times slower on two processes than on one. Here the ranks copy their numbers into shared
memory (`ops/native/sums.cpp`) and wait for each other in the threads that train.
"""

import contextlib
import ctypes
import functools
import mmap
import os
import secrets
from collections.abc import Sequence
from ctypes import POINTER, byref, c_double, c_int, c_int64, c_void_p

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.ops.native.build import optional_library

SPINS = 2000  # looks at another rank's counter before a rank sleeps
SERVED = tuple({("cpu", dtype, True)} for dtype in (torch.float32, torch.float64))
OUTCOMES = (
    "",
    "did not come within the time-out",
    "sums other numbers",
    "ended",
    "sums no more, after an error or its end",
)
TOKEN_BYTES = 16


class SharedSums:
    """The memory through which the ranks sum; `open_sums` opens it.

    Args:
        library: The compiled kernels.
        memory: The shared memory, zero at first.
        rank: Number of this process.
        handles: Of each process a handle by which it is seen to end; this class closes them.
        timeout_seconds: How long a rank waits for the others.
        spins: How often a rank looks whether another one is there before it sleeps.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        memory: mmap.mmap,
        rank: int,
        *,
        handles: Sequence[int],
        timeout_seconds: float,
        spins: int,
    ) -> None:
        self.size, self.timeout_seconds = len(handles), timeout_seconds
        self._library, self._rank, self._spins = library, rank, spins
        self._memory = ctypes.c_char.from_buffer(memory)  # keeps the memory
        self._handles = (c_int * self.size)(*handles)

    def close(self) -> None:
        """Sum no more: ranks that wait for this one get an error at once."""
        self._library.sums_leave(ctypes.addressof(self._memory), self._rank)
        for handle in self._handles:
            os.close(handle)

    def serves(self, *tensors: Tensor) -> bool:
        """Return whether `add` can sum tensors: of one dtype, fp32 or fp64, without gaps, in the host's memory."""
        return {(t.device.type, t.dtype, t.is_contiguous()) for t in tensors} in SERVED

    def add(self, *tensors: Tensor, factor: float = 1.0) -> None:
        """Replace tensors by `factor` times their sums over the ranks, which have the same bits on each of them (collective).

        Args:
            tensors: As many bytes on all ranks; `serves` says which tensors.
            factor: One for the sums, or one over the number of ranks for the means.

        Raises:
            torch.distributed.DistError: Another rank ended, did not come in time, or sums other numbers. All later sums of all
                ranks fail too.
        """
        number, culprit = len(tensors), c_int64()
        outcome = self._library.sums_add(
            ctypes.addressof(self._memory),
            self.size,
            self._rank,
            (c_void_p * number)(*(t.data_ptr() for t in tensors)),
            (c_int64 * number)(*(t.nbytes for t in tensors)),
            number,
            tensors[0].dtype == torch.float64,
            factor,
            self._spins,
            self.timeout_seconds,
            self._handles,
            byref(culprit),
        )
        if outcome:
            raise dist.DistError(f"a sum over the ranks failed: rank {culprit.value} {OUTCOMES[outcome]}")


def open_sums(rank: int, size: int, timeout_seconds: float, spins: int = SPINS) -> SharedSums | None:
    """Open the memory of all ranks (collective; the process group must be there).

    Rank 0's memory has no name, so nothing is left behind when a process is killed. The others find it through /proc. A
    random token tells it from the memory of a process with the same number on another machine.

    Args:
        rank: Number of this process.
        size: Number of processes.
        timeout_seconds: How long a rank waits for the others.
        spins: How often a rank looks before it sleeps; 0 where ranks share a core, since one that waits without sleeping would
            keep it from the one that it waits for.

    Returns:
        None where the ranks run on several machines or in separate containers, the kernels cannot be built, or the system
        is no Linux of version 5.3 or later.
    """
    library, memory = _library(), None
    own, token, box = -1, secrets.token_bytes(TOKEN_BYTES), [("", b"")]
    if rank == 0 and library is not None:
        with contextlib.suppress(OSError, AttributeError):
            own = os.memfd_create("sums")
            os.pwrite(own, token, library.sums_bytes(size))
            box = [(f"/proc/{os.getpid()}/fd/{own}", token)]
    dist.broadcast_object_list(box, device=torch.device("cpu"))
    processes = [0] * size
    dist.all_gather_object(processes, os.getpid())
    handles: list[int] = []
    if library is not None and (memory := _map(*box[0], library.sums_bytes(size))):
        with contextlib.suppress(OSError, AttributeError):
            handles += map(os.pidfd_open, processes)
    found = torch.tensor([len(handles) == size])
    dist.all_reduce(found, op=dist.ReduceOp.PRODUCT)
    if own >= 0:
        os.close(own)
    if found and library and memory:
        return SharedSums(library, memory, rank, handles=handles, timeout_seconds=timeout_seconds, spins=spins)
    for handle in handles:
        os.close(handle)
    return None


def _map(path: str, token: bytes, size: int) -> mmap.mmap | None:
    """Return the memory behind a path if its bytes after `size` are the token."""
    try:
        file = os.open(path, os.O_RDWR)
    except OSError:
        return None
    try:
        if os.pread(file, TOKEN_BYTES, size) != token:
            return None
        return mmap.mmap(file, size)
    except (OSError, ValueError):
        return None
    finally:
        os.close(file)


@functools.cache
def _library() -> ctypes.CDLL | None:
    library = optional_library("sums over the ranks")
    if library is None:
        return None
    library.sums_bytes.argtypes, library.sums_bytes.restype = [c_int64], c_int64
    library.sums_leave.argtypes, library.sums_leave.restype = [c_void_p, c_int64], None
    library.sums_add.argtypes = [
        *(c_void_p, c_int64, c_int64, POINTER(c_void_p), POINTER(c_int64), c_int64),
        *(c_int64, c_double, c_int64, c_double, POINTER(c_int), POINTER(c_int64)),
    ]
    library.sums_add.restype = c_int64
    return library
