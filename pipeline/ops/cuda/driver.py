"""Compile kernels with NVRTC, which every CUDA build of torch brings, and launch them with the CUDA driver.

So a user needs neither nvcc nor headers, and nothing is linked against torch. A compiled kernel is kept in the user's cache
folder under a hash of its sources, its options and the compiler's version.
"""

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import sys
from collections.abc import Callable
from ctypes import Structure, addressof, byref, c_char_p, c_int, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import torch

from pipeline.files import replacing
from pipeline.ops.cuda.program import FOLDER, THREADS, Program
from pipeline.ops.native.build import cache_folder

SHARED_BYTES_ATTRIBUTE = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
SHARED_SHARE_ATTRIBUTE = 9  # CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, in percent
RESERVED_SHARED_BYTES = 1024  # the system keeps these bytes in every block
OLDEST = (8, 0)  # bf16 conversions


class CudaError(Exception):
    """NVRTC or the driver refused. The text is one line."""


def nvrtc(version: str | None = torch.version.cuda) -> ctypes.CDLL:
    """Return NVRTC.

    Args:
        version: Of CUDA, `major.minor`; by default the one that torch is built for.

    Raises:
        CudaError: torch is built without CUDA, or the library is not where torch's packages put it.
    """
    if version is None:
        raise CudaError("this torch is built without CUDA")
    _open(f"libnvrtc-builtins.so.{version}")  # NVRTC looks for it by this name and finds it, as it is loaded by then
    return _open(f"libnvrtc.so.{version.split('.')[0]}")


def _open(name: str) -> ctypes.CDLL:
    """Load a library from the system's folders, or from those of NVIDIA's packages, which the loader does not know."""
    packages = (path for folder in sys.path for path in Path(folder).glob(f"nvidia/*/lib/{name}"))
    for place in (name, *map(str, packages)):
        with contextlib.suppress(OSError):
            return ctypes.CDLL(place, ctypes.RTLD_GLOBAL)
    raise CudaError(f"{name} is missing, though torch is built for CUDA {torch.version.cuda}")


def compile_program(library: ctypes.CDLL, program: Program, arch: str) -> bytes:
    """Return the machine code of a program.

    Args:
        library: NVRTC.
        program: What to compile.
        arch: For example `sm_80`.

    Raises:
        CudaError: It does not compile.
    """
    major, minor = c_int(), c_int()
    library.nvrtcVersion(byref(major), byref(minor))
    options = [f"--gpu-architecture={arch}", "--std=c++17", f"--include-path={FOLDER}", *program.macros()]
    options.append(f"--ptxas-options={program.assembler_option(arch)}")
    told = f"{arch} NVRTC {major.value}.{minor.value} {program.assembler_option(arch)}\n{program.text()}"
    cached = cache_folder() / f"cuda-{hashlib.sha256(told.encode()).hexdigest()[:20]}.cubin"
    with contextlib.suppress(FileNotFoundError):
        return cached.read_bytes()
    with open(cached.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the ranks of a node wait for the first one
        if not cached.exists():
            code = _compile(library, program, options)
            with replacing(cached) as unfinished:
                unfinished.write_bytes(code)
    return cached.read_bytes()


def _compile(library: ctypes.CDLL, program: Program, options: list[str]) -> bytes:
    handle = c_void_p()
    source = (FOLDER / program.source).read_bytes()
    words = (c_char_p * len(options))(*(option.encode() for option in options))
    _expect(library.nvrtcCreateProgram(byref(handle), source, program.source.encode(), 0, None, None), "NVRTC")
    try:
        if library.nvrtcCompileProgram(handle, len(options), words):
            raise CudaError(f"NVRTC does not compile {program.source}: {_log(library, handle)}")
        size = c_size_t()
        _expect(library.nvrtcGetCUBINSize(handle, byref(size)), "NVRTC")
        code = ctypes.create_string_buffer(size.value)
        _expect(library.nvrtcGetCUBIN(handle, code), "NVRTC")
    finally:
        library.nvrtcDestroyProgram(byref(handle))
    return code.raw


def _log(library: ctypes.CDLL, handle: c_void_p) -> str:
    size = c_size_t()
    library.nvrtcGetProgramLogSize(handle, byref(size))
    text = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(handle, text)
    lines = text.value.decode(errors="replace").splitlines()
    return next((line for line in lines if "error" in line), "no reason given")


def _expect(code: int, who: str) -> None:
    if code:
        raise CudaError(f"{who} reports error {code}")


class Driver:
    """GPUs. Programs are compiled at their first launch on a device.

    Raises:
        CudaError: NVRTC or the driver's library is missing.
    """

    def __init__(self) -> None:
        self._nvrtc = nvrtc()
        try:
            self._cuda = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise CudaError(f"the driver's library is missing: {error}") from error
        self._function: Callable[[Program, str, int], Any] = functools.cache(self._load)
        self._allowed: dict[tuple[Program, str, int], int] = {}  # the shared memory that a kernel may have on a device
        self._properties = functools.cache(torch.cuda.get_device_properties)

    def shared_bytes(self, device: torch.device) -> int:
        """Implement `Device.shared_bytes`."""
        return self._properties(device).shared_memory_per_multiprocessor // 2 - RESERVED_SHARED_BYTES

    def resident_blocks(self, device: torch.device) -> int:
        """Implement `Device.resident_blocks`."""
        return 2 * self._properties(device).multi_processor_count

    def launch(
        self, program: Program, kernel: str, call: Structure, blocks: int, shared_bytes: int, device: torch.device
    ) -> None:
        """Implement `Device.launch`."""
        with torch.cuda.device(device):
            key = program, kernel, torch.cuda.current_device()
            function = self._function(*key)
            if shared_bytes > self._allowed.get(key, 48 << 10):
                # the largest share of the first-level memory, so that two blocks fit
                for attribute, value in ((SHARED_BYTES_ATTRIBUTE, shared_bytes), (SHARED_SHARE_ATTRIBUTE, 100)):
                    self._check(self._cuda.cuFuncSetAttribute(function, attribute, value))
                self._allowed[key] = shared_bytes
            stream = c_void_p(torch.cuda.current_stream(device).cuda_stream)
            arguments = (c_void_p * 1)(addressof(call))
            sizes = blocks, 1, 1, THREADS, 1, 1, shared_bytes
            self._check(self._cuda.cuLaunchKernel(function, *map(c_int, sizes), stream, arguments, None))

    def _load(self, program: Program, kernel: str, index: int) -> c_void_p:
        """Return a kernel on a device; its primary context, which torch uses, is current."""
        major, minor = torch.cuda.get_device_capability(index)
        if (major, minor) < OLDEST:
            raise CudaError(f"the kernels need compute capability 8.0 or newer, this GPU has {major}.{minor}")
        torch.cuda.current_stream(index).synchronize()  # makes sure that the context exists and is current
        code = compile_program(self._nvrtc, program, f"sm_{major}{minor}")
        module, function = c_void_p(), c_void_p()
        self._check(self._cuda.cuModuleLoadData(byref(module), code))
        self._check(self._cuda.cuModuleGetFunction(byref(function), module, kernel.encode()))
        return function

    def _check(self, code: int) -> None:
        if code:
            text = c_char_p()
            self._cuda.cuGetErrorString(code, byref(text))
            raise CudaError(f"the CUDA driver: {(text.value or b'unknown error').decode()}")
