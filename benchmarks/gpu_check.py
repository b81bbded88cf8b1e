"""What to run on the first day with a GPU: `make gpu-check`, or `python -m benchmarks.gpu_check [--minutes 30]`.

1. On any machine: every kernel of the CPU against the reference, the CUDA kernels' source on the CPU, and the tests that count
   what waits for a device.
2. On a GPU: tests/gpu; the scan timed beside mamba-ssm's where that is installed; the three demo stages in fp32 and bf16 at
   ZeRO 0 to 3, whose losses must agree; what the host waits for in a profile; memory and time of 20 steps of each ImageNet
   config, on photographs made on the spot, beside the plan.
3. On two GPUs or more also: a rank that is killed, and one that freezes.

It needs no network. A part that fails does not stop the others; one that has no time left is named. The results go to
docs/gpu/DEVICE.md and DEVICE.json, and the JSON object is the last line. The exit code is 5 if a part failed, and where torch
sees no GPU: then it ends after the first part, and says why.
"""

import argparse
import functools
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import gpu_runs
from benchmarks.gpu_runs import ROOT, Runner
from pipeline.cli import guarded
from pipeline.errors import EnvironmentProblem, PipelineError
from pipeline.ops import choice
from pipeline.train.gpus import Torch, driver, why_none

FOLDER = ROOT / "docs" / "gpu"
CPU_TESTS = ("tests/unit/ops/test_cuda.py", "tests/unit/ops/test_autocast.py", "tests/unit/test_hot_loop.py")
GPU_TESTS = ("tests/gpu",)
FAULT_TESTS = "tests/integration/test_faults.py"
# Those that only vary another one come last.
IMAGENET = sorted((ROOT / "configs").glob("*/imagenet_*.yaml"), key=lambda path: ("\nbase:" in path.read_text(), path))

Found = dict[str, float | str]


class Part(NamedTuple):
    """A part of the check: a name, and what returns its numbers or raises why it failed."""

    name: str
    run: Callable[[], Found]


def check(parts: Sequence[Part], minutes: float) -> tuple[Found, list[str]]:
    """Run the parts in order, until the time is over.

    Returns:
        What they found with the seconds of each, and a sentence for each part that failed.
    """
    found: Found = {}
    problems: list[str] = []
    end = time.monotonic() + 60 * minutes
    for part in parts:
        begin = time.monotonic()
        if begin > end:
            found[f"{part.name}_left_out"] = f"no time left of {minutes:g} minutes"
            continue
        print(f"gpu-check: {part.name}", flush=True)
        try:
            found |= part.run()
        except PipelineError as error:
            problems.append(f"{part.name}: {error}")
            print(f"gpu-check: {part.name} FAILED: {error}", flush=True)
        found[f"{part.name}_seconds"] = time.monotonic() - begin
    return found, problems


def kernels(device: str) -> Found:
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


def tests(*words: str) -> Found:
    """Run tests.

    Raises:
        EnvironmentProblem: One fails.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-rs", *words]
    if subprocess.run(command, cwd=ROOT, check=False).returncode:
        raise EnvironmentProblem(f"a test of `{' '.join(words)}` fails here; its output is above")
    return {}


def prepare(folder: Path, start: gpu_runs.Start = gpu_runs.subprocess_start, **size: int) -> tuple[Runner, Runner]:
    """Make the images, and return what runs the demo's stages and what runs the ImageNet recipes.

    Args:
        folder: Receives images and runs.
        start: As in Runner.
        **size: As in `gpu_runs.photographs`.
    """
    digits, photographs = folder / "digits", folder / "photographs"
    runner = Runner(folder / "runs", {}, start)
    runner.command(["pipeline.data", "convert", "digits", "--out", str(digits)])
    split = ["--imbalance", "10", "--labelled", "0.1", "--validation-per-class", "15", "--seed", "0"]
    runner.command(
        ["pipeline.data", "split", str(digits / "train"), "--out", str(folder / "digits-split.json"), *split]
    )
    gpu_runs.photographs(folder, **size)
    convert = ["pipeline.data", "convert", "imagefolder", str(folder / "train"), "--out", str(photographs)]
    runner.command([*convert, "--unlabelled", str(folder / "pool")])
    usual = [f"data.train={digits / 'train'}", f"data.split={folder / 'digits-split.json'}"]
    tested = [*usual, f"data.test={digits / 'test'}"]
    demo = Runner(folder / "runs", {"arm": usual, "distill": tested, "semi": tested}, start)
    recipes = Runner(folder / "runs", {key: [f"data.train={photographs}"] for key in gpu_runs.STAGES}, start)
    return demo, recipes


def parts_of(folder: Path, gpus: int) -> list[Part]:
    """Return the parts that need a GPU, the quick and decisive ones first."""
    from benchmarks.gpu_scan import measure, mixers

    runners = functools.cache(lambda: prepare(folder))  # made by the first part that runs a stage
    parts = [
        Part("kernels", lambda: kernels("cuda")),
        Part("tests_gpu", lambda: tests(*GPU_TESTS)),
        Part("scan_times", lambda: {**measure(), **mixers(torch.device("cuda"))}),
        Part("waits", lambda: gpu_runs.waits(runners()[0])),
        Part("zero_stages", lambda: gpu_runs.equal_losses(runners()[0])),
    ]
    if gpus > 1:
        parts.append(Part("faults", lambda: tests(FAULT_TESTS, "-k", "frozen or other_processes")))
    preset = ["cluster:gpus_per_node=1", "--cluster", str(ROOT / "configs" / "cluster" / "a100.yaml")]
    for path in IMAGENET:
        stage = path.parent.name
        words = gpu_runs.alone(stage, path, processes=1)

        def cost(stage: str = stage, path: Path = path, words: list[str] = words) -> Found:
            return gpu_runs.cost(runners()[1], stage, path, *words, cluster=preset)

        parts.append(Part(f"{stage}_{path.stem}", cost))
    return parts


def page(device: str, found: Found, problems: Sequence[str]) -> str:
    """Return the Markdown page about a device."""
    rows = "".join(f"| {k} | {v if isinstance(v, str) else f'{v:.4g}'} |\n" for k, v in found.items())
    failed = "".join(f"- {problem}\n" for problem in problems) or "none\n"
    table = f"| what | found |\n| --- | --- |\n{rows}"
    return f"# {device}\n\nWritten by `make gpu-check`.\n\n## What failed\n\n{failed}\n## What was found\n\n{table}"


def write(folder: Path, device: str, found: Found, problems: Sequence[str]) -> Path:
    """Write the page and the JSON object of a device, and return the path of the page."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / re.sub(r"[^A-Za-z0-9]+", "-", device).strip("-").lower()
    path.with_suffix(".md").write_text(page(device, found, problems))
    values = {"device": device, **found, "failed": list(problems)}
    path.with_suffix(".json").write_text(json.dumps(values, indent=1) + "\n")
    return path.with_suffix(".md")


def _run(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0, help="no part begins after so long (default 30)")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the page (default docs/gpu)")
    given = parser.parse_args(words)
    found = kernels("cpu") | tests(*CPU_TESTS)
    print("the parts for any machine pass", flush=True)
    build = Torch(torch.__version__, torch.version.cuda)
    if not torch.cuda.is_available():
        raise EnvironmentProblem(
            f"the rest needs a GPU of compute capability 8.0 or newer: {why_none(build, driver())}"
        )
    device, gpus = torch.cuda.get_device_name(), torch.cuda.device_count()
    found |= {"torch": build.version, "cuda": build.cuda or "", "driver": driver() or "", "gpus": gpus}
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as name:
        measured, problems = check(parts_of(Path(name), gpus), given.minutes)
    found |= measured
    print(f"gpu-check: {write(given.out, device, found, problems)}")
    print(json.dumps({"device": device, **found, "failed": problems}))
    if problems:
        raise EnvironmentProblem(f"{len(problems)} parts failed: {'; '.join(problems)}")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(_run, sys.argv[1:]))
