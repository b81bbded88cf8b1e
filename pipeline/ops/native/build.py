"""Compile the kernels once per machine and load them.

The library lies in the user's cache folder under a key of the sources, the flags, torch and the compiler, so a new
torch, another CPU on a shared home or an edited kernel builds anew and nothing stale is ever loaded. A build takes
seconds: of torch it includes only `at::parallel_for`, and Python calls it through ctypes.
"""

import ctypes
import fcntl
import hashlib
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

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
SOURCES = (FOLDER / "scan.cpp", FOLDER / "conv.cpp", FOLDER / "distance.cpp")
HEADERS = tuple(FOLDER / name for name in ("simd.h", "tiles.h", "products.h", "layers.h"))
# No -ffast-math: a NaN must stay a NaN. Contraction (fused multiply-add) rounds once instead of twice, nothing else.
FLAGS = ("-O3", "-std=c++20", "-fPIC", "-shared", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno", "-w")
SIMD = {
    "avx512": ("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mavx2", "-mfma"),  # 16 lanes
    "avx2": ("-mavx2", "-mfma"),  # 8 lanes
    "baseline": (),  # 4 lanes: SSE2, NEON
}


class BuildError(Exception):
    """No compiler, or it refused; the text is one line."""


def best_simd() -> str:
    """The widest entry of SIMD that this processor runs."""
    capability = torch.backends.cpu.get_cpu_capability()
    return {"AVX512": "avx512", "AVX2": "avx2"}.get(capability, "baseline")


def cache_folder() -> Path:
    """Where built libraries lie: the platform's cache folder for users."""
    if platform.system() == "Darwin":
        return Path.home() / "Library" / "Caches" / "visionmamba-pipeline"
    return Path.home() / ".cache" / "visionmamba-pipeline"


def find_compiler() -> str:
    """Path of a C++ compiler, or BuildError."""
    for name in ("g++", "clang++", "c++"):
        if path := shutil.which(name):
            return path
    raise BuildError("no C++ compiler (g++ or clang++) on the PATH")


def load_library(simd: str | None = None, cache: Path | None = None, sources: Sequence[Path] = SOURCES) -> ctypes.CDLL:
    """The kernels for `simd` (default: the best), built if the cache has none. BuildError if that fails.

    Processes that start together wait for the first one's build: a file lock per key, and a rename at the end, so a
    killed build leaves nothing that could be loaded.
    """
    flags = (*FLAGS, *SIMD[simd or best_simd()])
    compiler = find_compiler()
    library = (cache or cache_folder()) / f"ops-{_key(compiler, flags, sources)}.so"
    if not library.exists():
        try:
            library.parent.mkdir(parents=True, exist_ok=True)
            with open(library.with_suffix(".lock"), "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not library.exists():
                    _compile(compiler, flags, sources, library)
        except OSError as error:
            raise BuildError(f"cannot build in {library.parent}: {error}") from error
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise BuildError(f"cannot load {library}: {error}") from error


def _key(compiler: str, flags: Sequence[str], sources: Sequence[Path]) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    digest = hashlib.sha256(repr((flags, torch.__version__, version, platform.machine())).encode())
    for path in (*sources, *HEADERS):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:20]


def _compile(compiler: str, flags: Sequence[str], sources: Sequence[Path], library: Path) -> None:
    site = Path(torch.__file__).parent
    unfinished = library.with_suffix(f".{os.getpid()}.tmp")
    command = [compiler, *flags, f"-I{site / 'include'}", f"-I{FOLDER}", *map(str, sources)]
    command += [f"-L{site / 'lib'}", f"-Wl,-rpath,{site / 'lib'}", "-ltorch_cpu", "-lc10", "-o", str(unfinished)]
    if sysconfig.get_platform().startswith("macosx"):
        command.remove("-fopenmp")  # Apple's clang has none; at::parallel_for is then serial here
    logger.info("building the native kernels with %s (once; kept in %s)", Path(compiler).name, library.parent)
    begin = time.perf_counter()
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode:
        unfinished.unlink(missing_ok=True)
        errors = [line for line in finished.stderr.splitlines() if "error" in line] or [finished.stderr.strip()[-200:]]
        raise BuildError(f"{Path(compiler).name} failed: {errors[0]}")
    unfinished.replace(library)
    logger.info("built the native kernels in %.0f s", time.perf_counter() - begin)
