"""Real runs of the stages for `make gpu-check`: equal losses, waits in a profile, and cost against the plan.

Everything works on a CPU too, with small configs; `tests/integration/test_gpu_check.py` runs it so.
"""

import json
import os
import re
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.config import read_values
from pipeline.errors import EnvironmentProblem
from pipeline.jsonl import read_rows

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("arm", "distill", "semi")
# How far the losses of two ZeRO stages may lie apart on average, as a share: sums in another order, rounded to the precision.
# Single steps may differ more in stage 3, where a rounding can move a pseudo-label across the threshold.
BOUNDS = {"fp32": 1e-3, "bf16": 5e-2}
LEFT_OUT = 5  # first steps of a run, which compile kernels and fill caches
# What a host waits for on a GPU, by the names of a trace.
WAITS = re.compile(
    r"cuda(Stream|Device|Event)Synchronize|Memcpy (HtoD|DtoH) \(.*Pageable.*\)|aten::_local_scalar_dense"
)

_VIT: dict[str, Any] = {"image_size": 224, "options": {"global_pool": "avg"}}
# The models of those stages 3 whose parent is no config of the same name.
MODELS_OF_PARENTS: dict[str, dict[str, Any]] = {
    "imagenet_lt_fixmatch_resnet50": {"name": "timm/resnet50"},
    "imagenet_semivim_base_released": {"name": "semivim_base"},
    "imagenet_semivit_base": {"name": "timm/vit_base_patch16_224.mae", **_VIT},
    "imagenet_semivit_large": {"name": "timm/vit_large_patch16_224.mae", **_VIT},
    "imagenet_semivit_huge": {"name": "timm/vit_huge_patch14_224.mae", **_VIT},
}

Start = Callable[[list[str]], tuple[int, str]]


def subprocess_start(words: list[str]) -> tuple[int, str]:
    """Run `python -m WORDS` in the checkout, with one thread per process; return its exit code and what it said last."""
    # Several processes with a thread for each core would spend their time on waiting for each other.
    environment = {"OMP_NUM_THREADS": "1"} | os.environ
    command = [sys.executable, "-m", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


def at_once(jobs: Sequence[Callable[[], Any]]) -> list[Any]:
    """Run jobs beside each other, half as many as there are cores; return their results in order, or raise the first error."""
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2)) as pool:
        return [future.result() for future in [pool.submit(job) for job in jobs]]


class Runner:
    """Runs commands as a person would, with all runs in one folder.

    Args:
        runs: The folder.
        data: `key=value` of the images, for each stage.
        start: Runs `python -m WORDS`.
    """

    def __init__(self, runs: Path, data: Mapping[str, Sequence[str]], start: Start = subprocess_start) -> None:
        self.runs, self.data, self.start = runs, data, start

    def command(self, words: list[str]) -> None:
        """Run a command.

        Raises:
            EnvironmentProblem: It fails.
        """
        code, said = self.start(words)
        if code:
            last = next((line for line in reversed(said.splitlines()) if line.strip()), "")
            raise EnvironmentProblem(f"`python -m {' '.join(words)}` ended with {code}: {last}")

    def words(self, stage: str, recipe: str | Path, experiment: str, *overrides: str) -> list[str]:
        """Return the words of a stage after its command."""
        path = str(recipe) if isinstance(recipe, Path) else f"configs/{stage}/{recipe}.yaml"
        return [stage, path, f"run.root={self.runs}", f"run.experiment={experiment}", *self.data[stage], *overrides]

    def folder(self, stage: str, experiment: str) -> Path:
        """Return the folder of a run."""
        return self.runs / experiment / stage

    def rows(self, stage: str, experiment: str) -> list[dict[str, float]]:
        """Return the logged rows of a run's steps."""
        return [row for row in read_rows(self.folder(stage, experiment) / "metrics.jsonl") if "train/loss" in row]


def equal_losses(
    runner: Runner,
    config: str = "demo",
    *,
    steps: int = 30,
    zeros: Sequence[int] = (0, 1, 2),  # one process computes 3 as 2
    precisions: Sequence[str] = ("fp32", "bf16"),
    stages: Sequence[str] = STAGES,
    optimizer: str | None = None,
) -> dict[str, float | str]:
    """Run the stages at each ZeRO stage and precision beside each other, and compare the losses of each step.

    Args:
        runner: Runs the commands.
        config: Name of the config of each stage.
        steps: Steps of each run.
        zeros: ZeRO stages to compare.
        precisions: Of `BOUNDS`.
        stages: Each starts from the export of the one before.
        optimizer: A value of `optim.kind`, which then stands in the names of what is returned; None is the config's.

    Returns:
        For each stage and precision the largest and the mean difference to the first ZeRO stage, as shares of the loss; the
        mean is that of the ZeRO stage that differs most.

    Raises:
        EnvironmentProblem: A run fails, or a mean is above BOUNDS.
    """
    found: dict[str, float | str] = {}
    short = [f"loop.steps={steps}", "loop.log_every=1", "optim.warmup_steps=2", f"loop.save_every={steps}"]

    def chain(precision: str, zero: int) -> dict[str, list[float]]:
        name = "-".join(word for word in (optimizer, precision, f"zero{zero}") if word)
        chosen = [f"engine.zero_stage={zero}", f"engine.precision={precision}", *short]
        chosen += [f"optim.kind={optimizer}"] if optimizer else []
        losses = {}
        for stage in stages:
            runner.command(["stages", *runner.words(stage, config, name, *chosen)])
            losses[stage] = [row["train/loss"] for row in runner.rows(stage, name)]
        return losses

    chains = at_once([partial(chain, precision, zero) for precision in precisions for zero in zeros])
    for k, precision in enumerate(precisions):
        for stage in stages:
            runs = [losses[stage] for losses in chains[k * len(zeros) : (k + 1) * len(zeros)]]
            apart = [[abs(a - b) / abs(a) for a, b in zip(runs[0], run, strict=True)] for run in runs]
            mean = max(map(statistics.mean, apart))
            about = f"losses_{stage}_{optimizer}_{precision}" if optimizer else f"losses_{stage}_{precision}"
            found[f"{about}_largest_difference"] = max(map(max, apart))
            found[f"{about}_mean_difference"] = mean
            if mean > BOUNDS[precision]:
                raise EnvironmentProblem(
                    f"the losses of {stage} in {precision} differ by {mean:.1e} on average between the ZeRO stages {list(zeros)};"
                    f" at most {BOUNDS[precision]:.0e} is allowed"
                )
    return found


def waits(
    runner: Runner, config: str = "demo", *, zeros: Sequence[int] = (0, 2), stage: str = "arm", steps: int = 40
) -> dict[str, float | str]:
    """Profile a run between two log lines, and count for each ZeRO stage what the host waited for, per step."""

    def profiled(zero: int) -> dict[str, float]:
        name = f"profile-zero{zero}"
        folder = runner.folder(stage, name)
        folder.mkdir(parents=True)
        (folder / "profile").touch()  # asks for a trace
        chosen = [f"engine.zero_stage={zero}", f"loop.steps={steps}", f"loop.log_every={steps}", "loop.vote_every=4"]
        chosen += ["optim.warmup_steps=2", f"loop.save_every={steps}"]
        runner.command(["stages", *runner.words(stage, config, name, *chosen)])
        trace = next((folder / "report").glob("trace_step_*.json"))
        return {f"waits_zero{zero}_{what}": number for what, number in waits_of(trace).items()}

    return {
        what: number for found in at_once([partial(profiled, zero) for zero in zeros]) for what, number in found.items()
    }


def waits_of(trace: Path) -> dict[str, float]:
    """Count in a trace of `pipeline.train.tracer` what the host waits for: a name -> its number per step."""
    from pipeline.train.tracer import STEPS_TRACED

    names = Counter(
        event["name"]
        for event in json.loads(trace.read_text())["traceEvents"]
        if event.get("ph") == "X" and WAITS.search(event["name"])
    )
    return {name: number / STEPS_TRACED for name, number in sorted(names.items())}


def plan(
    runner: Runner, stage: str, config: Path, *overrides: str, steps: int = 20, cluster: Sequence[str] = ()
) -> dict[str, float]:
    """Return what the plan says of some steps of a config; the arguments are those of `cost`."""
    runner.command(["launchers", "plan", *_short(runner, stage, config, overrides, steps), *cluster])
    path = runner.runs / _name(stage, config) / "plan.json"
    found: dict[str, float] = json.loads(path.read_text())["stages"][0]
    return found


def _name(stage: str, config: Path) -> str:
    return f"cost-{stage}-{config.stem}"


def _short(runner: Runner, stage: str, config: Path, overrides: Sequence[str], steps: int) -> list[str]:
    short = [f"loop.steps={steps}", "loop.log_every=1", "loop.eval_every=null", f"loop.save_every={steps}"]
    short += ["optim.warmup_steps=1", "optim.cooldown_steps=0", "data.test=null", *overrides]
    return runner.words(stage, config, _name(stage, config), *short)


def cost(
    runner: Runner, stage: str, config: Path, *overrides: str, planned: Mapping[str, float], steps: int = 20
) -> dict[str, float | str]:
    """Run some steps of a config, and set their memory and time beside those of the plan.

    Args:
        runner: Runs the commands.
        stage: The stage.
        config: Its config.
        *overrides: `key=value` for the plan and the run.
        planned: What `plan` returned.
        steps: How many steps, more than LEFT_OUT.
    """
    runner.command(["stages", *_short(runner, stage, config, overrides, steps)])
    rows = runner.rows(stage, _name(stage, config))[LEFT_OUT:]
    key = f"{stage}_{config.stem}"
    return {
        f"{key}_step_seconds": statistics.median(row["perf/step_seconds"] for row in rows),
        f"{key}_step_seconds_planned": planned["step_seconds"],
        f"{key}_step_seconds_least": planned["step_seconds_least"],
        f"{key}_memory_gib": max(row["perf/memory_gib"] for row in rows),
        f"{key}_memory_gib_planned": planned["memory_gib"],
        f"{key}_mfu": statistics.median(row["perf/mfu"] for row in rows),
        f"{key}_data_wait_share": statistics.median(row["perf/data_wait_share"] for row in rows),
    }


def photographs(
    folder: Path, *, classes: int = 1000, unlabelled: int = 1000, size: tuple[int, int] = (500, 375)
) -> None:
    """Write a dataset as large as ImageNet's images are: one image a class under `folder/train`, and `folder/pool`.

    Args:
        folder: Receives the images.
        classes: How many classes.
        unlabelled: Images without a label.
        size: (width, height) in pixels; 500 x 375 is ImageNet's most frequent size.
    """
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 256, (16, size[1] // 8 + 1, size[0] // 8 + 1, 3), dtype=np.uint8)
    pictures = [Image.fromarray(each).resize(size, Image.Resampling.BICUBIC) for each in coarse]
    places = [folder / "train" / f"class_{k:04d}" / "image.jpg" for k in range(classes)]
    places += [folder / "pool" / f"{k:05d}.jpg" for k in range(unlabelled)]
    for k, place in enumerate(places):
        place.parent.mkdir(parents=True, exist_ok=True)
        # Turned a little differently each time: equal files would count as duplicates.
        pictures[k % len(pictures)].rotate(k % 360).save(place, quality=90)


def alone(stage: str, path: Path, processes: int) -> list[str]:
    """Return what lets a config of the ImageNet recipes start without its parents, with one micro-batch a step and process.

    A stage 3 trains its parent's model from random weights, and a distillation runs without its teacher.
    """
    values = read_values(path)
    micro_batch = values["engine"].get("micro_batch", 128)
    found = [f"loop.global_batch={micro_batch * processes}", "data.split=null", "data.loader.virtual_readers=null"]
    if stage == "distill":
        found += ["init_from=null", "weights=null", "teacher=null"]
    if stage == "semi":
        model = MODELS_OF_PARENTS.get(path.stem)
        if model is None:
            model = read_values(path.parents[1] / "distill" / path.name)["model"]
        found += ["init_from=null", "teacher_from=null", f"model={json.dumps(model)}"]
    return found
