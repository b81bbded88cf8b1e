"""Run the kernels' own source on the CPU, for tests and for machines without a GPU (see `emulator.h`)."""

import ctypes
import fcntl
import functools
import hashlib
import subprocess
from ctypes import Structure, byref, c_int, c_longlong
from pathlib import Path

import torch

from pipeline.files import replacing
from pipeline.ops.cuda.program import FOLDER, THREADS, Program
from pipeline.ops.native.build import cache_folder, find_compiler


class Emulator:
    """A device that is no device. It compiles each program with the C++ compiler, in some seconds, and keeps it.

    Args:
        shared_bytes: Shared memory that a block may have; a small value sends the rest to global memory.
        resident_blocks: How many blocks it claims to run at a time.
    """

    def __init__(self, shared_bytes: int = 80 << 10, resident_blocks: int = 1) -> None:
        self._shared_bytes, self._resident_blocks = shared_bytes, resident_blocks

    def shared_bytes(self, device: torch.device) -> int:
        """Implement `Device.shared_bytes`."""
        return self._shared_bytes

    def resident_blocks(self, device: torch.device) -> int:
        """Implement `Device.resident_blocks`."""
        return self._resident_blocks

    def launch(
        self, program: Program, kernel: str, call: Structure, blocks: int, shared_bytes: int, device: torch.device
    ) -> None:
        """Implement `Device.launch`."""
        function = getattr(load(program), kernel)
        function(byref(call), c_longlong(blocks), c_int(THREADS), c_longlong(shared_bytes))


@functools.cache
def load(program: Program) -> ctypes.CDLL:
    """Return a program compiled for the CPU."""
    key = hashlib.sha256(program.text().encode()).hexdigest()[:20]
    library = cache_folder() / f"emulator-{key}.so"
    with open(library.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # processes that need the same program wait for the first one
        if library.exists():
            return ctypes.CDLL(str(library))
        with replacing(library) as unfinished:
            options = ["-O1", "-std=c++20", "-fPIC", "-shared", "-w", "-DEMULATE", f"-I{FOLDER}", *program.macros()]
            source = str(FOLDER / Path(program.source))
            subprocess.run(
                [find_compiler(), *options, "-x", "c++", source, "-o", str(unfinished)], check=True, capture_output=True
            )
    return ctypes.CDLL(str(library))
