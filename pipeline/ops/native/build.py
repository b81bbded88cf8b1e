"""Compile the kernels once per machine and load them.

The library lies in the user's cache folder, or among the temporary files where the home is on a network. Its name contains a
hash of the sources, the flags, the torch version, the compiler and the CPU. So a new torch, another CPU or an edited kernel
causes a new build, and no stale library is loaded. Beside it lies its SHA-256 (`.json`): a library that was damaged after its
build would end the process with a signal, so it is compared before it is loaded, and built again if it differs. A build takes
seconds, because it includes only `at::parallel_for` from torch. Python calls the library through ctypes.
"""

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import json
import logging
import os
import platform
import shutil
import subprocess
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from pipeline.files import node_cache, replace_text, replacing, sha256_of

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
SOURCES = tuple(
    FOLDER / name
    for name in ("scan.cpp", "conv.cpp", "projections.cpp", "distance.cpp", "norm.cpp", "sums.cpp", "affine.cpp")
)
HEADERS = tuple(FOLDER / name for name in ("simd.h", "tiles.h", "recurrence.h", "products.h", "layers.h", "vision.h"))
# No -ffast-math: a NaN must stay a NaN. Contraction (fused multiply-add) only rounds once instead of twice.
FLAGS = ("-O3", "-std=c++20", "-fPIC", "-shared", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno", "-w")
SIMD = {
    "avx512": ("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mavx2", "-mfma"),  # 16 lanes
    "avx2": ("-mavx2", "-mfma"),  # 8 lanes
    "baseline": (),  # 4 lanes: SSE2, NEON
}


class BuildError(Exception):
    """There is no compiler, or it failed. The text is one line."""


def best_simd() -> str:
    """Return the widest key of `SIMD` that this processor runs."""
    capability = torch.backends.cpu.get_cpu_capability()
    return {"AVX512": "avx512", "AVX2": "avx2"}.get(capability, "baseline")


def cache_folder() -> Path:
    """Return the folder of the built libraries.

    Raises:
        BuildError: No folder can be used safely.
    """
    try:
        return node_cache()
    except OSError as error:
        raise BuildError(str(error.strerror)) from None


@functools.cache
def cpu_fingerprint() -> str:
    """Return a hash of the instructions that this processor knows; equal processors have equal ones."""
    told = [platform.machine(), torch.backends.cpu.get_cpu_capability()]
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        told += sorted({line for line in lines if line.partition(":")[0].strip() in ("flags", "Features", "isa")})
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:16]


def find_compiler() -> str:
    """Return the path of a C++ compiler; BuildError if there is none."""
    for name in ("g++", "clang++", "c++"):
        if path := shutil.which(name):
            return path
    raise BuildError("no C++ compiler (g++ or clang++) on the PATH")


def load_library(simd: str | None = None, cache: Path | None = None, sources: Sequence[Path] = SOURCES) -> ctypes.CDLL:
    """Return the loaded kernels, after building them if the cache has none.

    Processes that start together wait for the build of the first one: each library has a file lock. The build ends
    with a rename, so a killed build leaves no library that could be loaded. A library whose hash differs is built again.

    Args:
        simd: The instruction set, a key of `SIMD`; by default the widest that this processor runs.
        cache: The folder of built libraries; by default `cache_folder()`.
        sources: The C++ files.

    Raises:
        BuildError: If there is no compiler, the compilation fails, or the folder cannot be written.
    """
    flags = (*FLAGS, *SIMD[simd or best_simd()])
    compiler = find_compiler()
    library = (cache or cache_folder()) / f"ops-{_key(compiler, flags, sources)}.so"
    try:
        if not _is_whole(library):
            library.parent.mkdir(parents=True, exist_ok=True)
            with open(library.with_suffix(".lock"), "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not _is_whole(library):
                    _compile(compiler, flags, sources, library)
    except OSError as error:
        raise BuildError(f"cannot build in {library.parent}: {error}") from error
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise BuildError(f"cannot load {library}: {error}") from error


def optional_library(what: str) -> ctypes.CDLL | None:
    """Return the loaded kernels, or None after a log line where they cannot be built.

    Args:
        what: What torch computes then, in the plural.
    """
    try:
        return load_library()
    except BuildError as error:
        logger.info("%s are computed in torch: %s", what, error)
        return None


def _record(library: Path) -> Path:
    return library.with_suffix(".json")


def _is_whole(library: Path) -> bool:
    """Whether a library holds the bytes that were built for this CPU, and belongs to this user."""
    try:
        record = json.loads(_record(library).read_text())
        if record != {"sha256": sha256_of(library), "cpu": cpu_fingerprint()}:
            raise ValueError
        return library.stat().st_uid in (0, os.geteuid())
    except FileNotFoundError:
        return False
    except (ValueError, RecursionError):
        logger.warning("%s is damaged or was built for another CPU; it is built again", library)
        return False


def _key(compiler: str, flags: Sequence[str], sources: Sequence[Path]) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    digest = hashlib.sha256(repr((flags, torch.__version__, version, cpu_fingerprint())).encode())
    for path in (*sources, *HEADERS):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:20]


def _compile(compiler: str, flags: Sequence[str], sources: Sequence[Path], library: Path) -> None:
    site = Path(torch.__file__).parent
    command = [compiler, *flags, f"-I{site / 'include'}", f"-I{FOLDER}", *map(str, sources)]
    command += [f"-L{site / 'lib'}", f"-Wl,-rpath,{site / 'lib'}", "-ltorch_cpu", "-lc10"]
    if sysconfig.get_platform().startswith("macosx"):
        command.remove("-fopenmp")  # Apple's clang has no OpenMP; at::parallel_for is then serial
    logger.info("building the native kernels with %s (once; kept in %s)", Path(compiler).name, library.parent)
    begin = time.perf_counter()
    with replacing(library) as unfinished:
        finished = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True, check=False)
        if finished.returncode:
            lines = finished.stderr.splitlines()
            errors = [line for line in lines if "error" in line] or [finished.stderr.strip()[-200:]]
            raise BuildError(f"{Path(compiler).name} failed: {errors[0]}")
        digest = sha256_of(unfinished)
    replace_text(_record(library), json.dumps({"sha256": digest, "cpu": cpu_fingerprint()}))
    logger.info("built the native kernels in %.0f s", time.perf_counter() - begin)
