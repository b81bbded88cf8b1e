"""What to run on the first day with a GPU: `make gpu-check`, or `python -m benchmarks.gpu_check`.

1. On any machine: every kernel of the CPU against the reference, the CUDA kernels' source on the CPU, and the tests that count
   what waits for a device.
2. On a GPU: tests/gpu, and the scan timed beside mamba-ssm's where that is installed.

It needs no network. The results go to docs/gpu/DEVICE.md and DEVICE.json, and the JSON object is the last line. Where torch sees
no GPU, it ends with exit code 5 after the first part, and says why.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import torch

from pipeline.cli import guarded
from pipeline.errors import EnvironmentProblem
from pipeline.ops import choice
from pipeline.train.gpus import Torch, driver, why_none

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "gpu"
CPU_TESTS = ("tests/unit/ops/test_cuda.py", "tests/unit/ops/test_autocast.py", "tests/unit/test_hot_loop.py")
GPU_TESTS = ("tests/gpu",)


def kernels(device: str) -> dict[str, float | str]:
    """Return the relative error of every implementation of the scan, or why it does not run.

    Raises:
        EnvironmentProblem: One is installed and fails.
    """
    rows = choice.report(device)
    for name, error, words in rows:
        print(f"scan on {device}: {name} {words if error is None else f'relative error {error:.0e}'}", flush=True)
        if words.startswith("FAILS"):
            raise EnvironmentProblem(f"the scan {name} on {device} {words}; the log above says more")
    return {f"scan_{device}_{name}": words if error is None else error for name, error, words in rows}


def tests(paths: tuple[str, ...]) -> None:
    """Run tests.

    Raises:
        EnvironmentProblem: One fails.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-rs", *paths]
    if subprocess.run(command, cwd=ROOT, check=False).returncode:
        raise EnvironmentProblem(f"a test of {', '.join(paths)} fails here; its output is above")


def page(device: str, found: dict[str, float | str]) -> str:
    """Return the Markdown page about a device."""
    rows = "".join(f"| {k} | {v if isinstance(v, str) else f'{v:.4g}'} |\n" for k, v in found.items())
    return f"# {device}\n\nWritten by `make gpu-check`.\n\n| what | found |\n| --- | --- |\n{rows}"


def _run(words: list[str]) -> int:
    found = kernels("cpu")
    tests(CPU_TESTS)
    print("the parts for any machine pass", flush=True)
    build = Torch(torch.__version__, torch.version.cuda)
    if not torch.cuda.is_available():
        raise EnvironmentProblem(
            f"the rest needs a GPU of compute capability 8.0 or newer: {why_none(build, driver())}"
        )
    from benchmarks.gpu_scan import measure

    device = torch.cuda.get_device_name()
    found |= {"torch": build.version, "cuda": build.cuda or "", "driver": driver() or "", **kernels("cuda")}
    tests(GPU_TESTS)
    found |= measure()
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / re.sub(r"[^A-Za-z0-9]+", "-", device).strip("-").lower()
    path.with_suffix(".md").write_text(page(device, found))
    path.with_suffix(".json").write_text(json.dumps({"device": device, **found}, indent=1) + "\n")
    print(json.dumps({"device": device, **found}))
    return 0


if __name__ == "__main__":
    sys.exit(guarded(_run, sys.argv[1:]))
