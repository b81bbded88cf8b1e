"""python -m tests.sanitize [PYTEST ARGUMENT ...]: run the tests of the compiled kernels under two sanitizers of the compiler.

The address sanitizer reports reads and writes outside of an allocation, the other one undefined behaviour. The kernels are
compiled with them into a folder that is deleted afterwards. The sanitizers must be in the process before anything else, so this
command starts itself again with them preloaded. The first error ends it with a report and an exit code that is not 0.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from pipeline.ops.native import build

ROOT = Path(__file__).resolve().parents[1]
TESTS = [
    f"tests/unit/{name}"
    for name in (
        "ops/test_native.py",
        "ops/test_projections.py",
        "ops/test_mamba.py",
        "ops/test_vision.py",
        "ops/test_stages.py",
        "ops/test_distance.py",
        "ops/test_norm.py",
        "ops/test_affine.py",
        "train/test_shared_sums.py",
    )
]
FLAGS = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
# Two errors with the words of their reports. A sanitizer that does not report its own would let every test pass.
WRONG = {"freed": "heap-use-after-free", "overflow": "signed integer overflow"}
SOURCE = """extern "C" {
void freed() { volatile float* volatile p = new float[4]; delete[] p; p[0] = 0; }
int overflow() { volatile int n = 2147483647; return n + 1; }
}
"""
INSIDE = "SANITIZERS_LOADED"


def preloaded() -> str:
    """Return the paths of the compiler's sanitizer libraries, for LD_PRELOAD."""
    compiler = build.find_compiler()
    names = ("libasan.so", "libubsan.so")
    return " ".join(
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in names
    )


def start_again(arguments: Sequence[str], cache: str, *, quiet: bool = False) -> "subprocess.CompletedProcess[str]":
    """Run this command with the sanitizers in the process, and with `cache` as the folder of compiled kernels."""
    # Python and torch keep memory until the end, which is no leak of the kernels.
    own = {"LD_PRELOAD": preloaded(), "ASAN_OPTIONS": "detect_leaks=0", INSIDE: cache, "HOME": cache}
    command = [sys.executable, "-m", "tests.sanitize", *arguments]
    return subprocess.run(
        command, env=os.environ | own, check=False, text=True, stderr=subprocess.PIPE if quiet else None
    )


def do_wrong(name: str, cache: Path) -> None:
    """Do what a sanitizer must report, in a library that is built as the kernels are."""
    source = cache / "wrong.cpp"
    source.write_text(SOURCE)
    getattr(build.load_library(cache=cache, sources=[source]), name)()


def main(arguments: list[str]) -> int:
    """Run the tests with the sanitizers, after a look whether these see anything."""
    os.chdir(ROOT)
    if INSIDE not in os.environ:
        with tempfile.TemporaryDirectory() as cache:
            for name, words in WRONG.items():
                seen = start_again([name], cache, quiet=True)
                if seen.returncode == 0 or words not in seen.stderr:
                    print(f"here the sanitizers do not report a {words}:\n{seen.stderr}", file=sys.stderr)
                    return 1
            return start_again(arguments, cache).returncode
    build.FLAGS = (*build.FLAGS, *FLAGS)
    if arguments and arguments[0] in WRONG:
        do_wrong(arguments[0], Path(os.environ[INSIDE]))
        return 0
    return int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *(arguments or TESTS)]))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
