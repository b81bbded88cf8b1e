"""What to run on the first day with a GPU: `make gpu-check`, or `python -m benchmarks.gpu_check [--minutes 30]`.

1. On any machine: every kernel of the CPU against the reference, the CUDA kernels' source on the CPU, and the tests that count
   what waits for a device.
2. On a GPU: tests/gpu; the scan timed beside mamba-ssm's where that is installed; the three demo stages in fp32 and bf16 at
   ZeRO 0 to 2, and two by Muon, whose losses must agree; what the host waits for in a profile; Vision Mambas and ViTs at growing
   resolutions; memory and time of 20 steps of each ImageNet config, on photographs made on the spot, beside the plan.
3. On two GPUs or more also: a rank that is killed, and one that freezes.

It needs no network. A part that fails does not stop the others; one that has no time left is named. `--only` runs some parts.
The results go to docs/gpu/DEVICE.md and DEVICE.json, beside what earlier runs of other parts have found there, and the JSON
object is the last line. The exit code is 5 if a part failed, and where torch sees no GPU: then it ends after the first part,
and says why.
"""

import argparse
import functools
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import gpu_page, gpu_runs
from benchmarks.gpu_runs import ROOT, Runner
from pipeline.cli import guarded
from pipeline.errors import ConfigError, EnvironmentProblem, PipelineError
from pipeline.ops import choice
from pipeline.ops.cuda.counted import GPUS
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


def check(parts: Sequence[Part], minutes: float) -> tuple[Found, dict[str, str]]:
    """Run the parts in order, until the time is over.

    Returns:
        What they found with the seconds of each, and for each part that failed a sentence.
    """
    found: Found = {}
    problems: dict[str, str] = {}
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
            problems[part.name] = str(error)
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


def demo_runner(folder: Path, start: gpu_runs.Start = gpu_runs.subprocess_start) -> Runner:
    """Convert the bundled digits, and return what runs the demo's stages.

    Args:
        folder: Receives images and runs.
        start: As in Runner.
    """
    digits = folder / "digits"
    runner = Runner(folder / "runs", {}, start)
    runner.command(["pipeline.data", "convert", "digits", "--out", str(digits)])
    split = ["--imbalance", "10", "--labelled", "0.1", "--validation-per-class", "15", "--seed", "0"]
    runner.command(
        ["pipeline.data", "split", str(digits / "train"), "--out", str(folder / "digits-split.json"), *split]
    )
    usual = [f"data.train={digits / 'train'}", f"data.split={folder / 'digits-split.json'}"]
    tested = [*usual, f"data.test={digits / 'test'}"]
    return Runner(folder / "runs", {"arm": usual, "distill": tested, "semi": tested}, start)


def recipes_runner(folder: Path, start: gpu_runs.Start = gpu_runs.subprocess_start, **size: int) -> Runner:
    """Make photographs, and return what runs the ImageNet recipes on them.

    Args:
        folder: As in `demo_runner`.
        start: As in Runner.
        **size: As in `gpu_runs.photographs`.
    """
    photographs = folder / "photographs"
    gpu_runs.photographs(folder, **size)
    convert = ["convert", "imagefolder", str(folder / "train"), "--out", str(photographs)]
    runner = Runner(folder / "runs", {key: [f"data.train={photographs}"] for key in gpu_runs.STAGES}, start)
    runner.command(["pipeline.data", *convert, "--unlabelled", str(folder / "pool")])
    return runner


def anywhere() -> list[Part]:
    """Return the parts for any machine."""
    return [Part("kernels_cpu", lambda: kernels("cpu")), Part("tests_cpu", lambda: tests(*CPU_TESTS))]


def parts_of(folder: Path, device: str, gpus: int, only: Sequence[str] = ()) -> list[Part]:
    """Return the parts that need a GPU, the quick and decisive ones first.

    Args:
        folder: Receives images and runs.
        device: What torch calls a GPU of this machine.
        gpus: How many there are.
        only: The names of those wanted; empty = all.
    """
    from benchmarks.gpu_models import times
    from benchmarks.gpu_scan import measure, mixers

    gpu = next((key for key in GPUS if key in device.lower()), "a100")
    # Made by the first part that needs them.
    demo, recipe = functools.cache(lambda: demo_runner(folder)), functools.cache(lambda: recipes_runner(folder))
    preset = [f"cluster:gpu={gpu}", "cluster:gpus_per_node=1", "--cluster", str(ROOT / "configs/cluster/a100.yaml")]
    recipes = {f"{path.parent.name}_{path.stem}": path for path in IMAGENET}
    wanted = {name: path for name, path in recipes.items() if name in only or not only}

    def words(path: Path) -> list[str]:
        return gpu_runs.alone(path.parent.name, path, processes=1)

    @functools.cache
    def plans() -> dict[str, dict[str, float]]:
        jobs = [
            functools.partial(gpu_runs.plan, recipe(), path.parent.name, path, *words(path), cluster=preset)
            for path in wanted.values()
        ]
        return dict(zip(wanted, gpu_runs.at_once(jobs), strict=True))

    def cost(name: str) -> Found:
        path = wanted[name]
        return gpu_runs.cost(recipe(), path.parent.name, path, *words(path), planned=plans()[name])

    parts = [
        Part("kernels", lambda: kernels("cuda")),
        Part("tests_gpu", lambda: tests(*GPU_TESTS)),
        Part("scan_times", lambda: {**measure(), **mixers(torch.device("cuda"))}),
        Part("models", lambda: times(torch.device("cuda"))),
        Part("waits", lambda: gpu_runs.waits(demo())),
        Part("zero_stages", lambda: gpu_runs.equal_losses(demo())),
        Part("muon", lambda: gpu_runs.equal_losses(demo(), zeros=(0, 2), stages=("arm", "distill"), optimizer="muon")),
    ]
    if gpus > 1:
        parts.append(Part("faults", lambda: tests(FAULT_TESTS, "-k", "frozen or other_processes")))
    parts += [Part(name, functools.partial(cost, name)) for name in recipes]
    return [part for part in parts if part.name in only or not only]


def write(folder: Path, device: str, found: Found, problems: Mapping[str, str]) -> Path:
    """Write the page and the JSON object of a device, with what earlier runs found there; return the path of the page."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / (re.sub(r"[^A-Za-z0-9]+", "-", device).strip("-").lower() + ".json")
    earlier = json.loads(path.read_text()) if path.exists() else {"failed": {}}
    ran = {name.removesuffix("_seconds") for name in found}
    failed = {name: sentence for name, sentence in earlier["failed"].items() if name not in ran} | problems
    kept = {name: value for name, value in earlier.items() if name.removesuffix("_left_out") not in ran}
    values = kept | {"device": device, **found, "failed": failed}
    path.write_text(json.dumps(values, indent=1) + "\n")
    path.with_suffix(".md").write_text(gpu_page.page(values))
    return path.with_suffix(".md")


def _run(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0, help="no part begins after so long (default 30)")
    parser.add_argument("--only", nargs="+", default=[], metavar="PART", help="the parts to run (default all)")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the page (default docs/gpu)")
    given = parser.parse_args(words)
    found: Found = {}
    if not given.only:
        found, problems = check(anywhere(), given.minutes)
        if problems:
            raise EnvironmentProblem(f"{len(problems)} parts failed: {_sentences(problems)}")
        print("the parts for any machine pass", flush=True)
    build = Torch(torch.__version__, torch.version.cuda)
    if not torch.cuda.is_available():
        raise EnvironmentProblem(
            f"the rest needs a GPU of compute capability 8.0 or newer: {why_none(build, driver())}"
        )
    device, gpus = torch.cuda.get_device_name(), torch.cuda.device_count()
    found |= {
        "date": date.today().isoformat(),
        "torch": build.version,
        "cuda": build.cuda or "",
        "driver": driver() or "",
        "gpus": gpus,
    }
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as name:
        parts = parts_of(Path(name), device, gpus, given.only)
        if unknown := set(given.only) - {part.name for part in parts}:
            known = ", ".join(part.name for part in parts_of(Path(name), device, gpus))
            raise ConfigError(f"no part is called {', '.join(sorted(unknown))}; on this machine there are {known}")
        measured, problems = check(parts, given.minutes)
    found |= measured
    print(f"gpu-check: {write(given.out, device, found, problems)}")
    print(json.dumps({"device": device, **found, "failed": problems}))
    if problems:
        raise EnvironmentProblem(f"{len(problems)} parts failed: {_sentences(problems)}")
    return 0


def _sentences(problems: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {sentence}" for name, sentence in problems.items())


if __name__ == "__main__":
    sys.exit(guarded(_run, sys.argv[1:]))
