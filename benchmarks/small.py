"""How well small models use the machine: `python -m benchmarks.small` prints one JSON line last.

Each stage of the demo runs as `make demo` runs it: real data, two processes, `fit`. A round is twenty of its steps; after them
every process times, in turn, as many steps of
- the same networks on the same number of images in a bare loop of torch: AdamW, no data, no engine, no other process;
- timm's ResNet-18 in the same bare loop, on as many images as cost the same FLOPs;
and then a matrix product by torch (`pipeline.train.peak`), and one as the project's layers compute it (`pipeline.ops.linear`).
The first step after the others' finds nothing of its own in the caches, and a step of a training does; so a round is not a
single step. All numbers are medians over the rounds.

MFU is `perf/mfu` of a run: the FLOPs that a step must compute, divided by its time and by what torch's matrix product reaches. A
step of the demo contains reading, views, log lines and the teacher, but no evaluation and no checkpoint.

Keys, for STAGE arm, distill and semi: mfu_STAGE, step_ms_STAGE and images_per_second_STAGE of the real steps; bare_mfu_STAGE,
bare_images_per_second_STAGE, resnet18_mfu_STAGE and resnet18_images_per_second_STAGE of the bare loops; step_vs_bare_STAGE, the
time of a real step over that of the bare one; peak_gflops of torch's product in one process, own_peak_gflops of the layers'
product. Images are those that the student learns from, over both processes.
"""

import argparse
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from pipeline.cli import guarded
from pipeline.config import load_config
from pipeline.data import main as data
from pipeline.models import build_from_config, build_model
from pipeline.models.arm import ARM
from pipeline.models.flops import forward_flops
from pipeline.ops.linear import linear
from pipeline.report.tensorboard import Board
from pipeline.streaming.batch import Batch
from pipeline.streaming.loader import Loader
from pipeline.train.distributed import World, barrier
from pipeline.train.loop import fit
from pipeline.train.optim import Trainable, parameter_groups
from pipeline.train.peak import measured_flops, peak_flops
from stages import SPECS
from stages.configs.base import StageConfig
from stages.context import StageContext
from stages.drivers import open_stage
from stages.spec import Network

PROCESSES = 2
STEPS = 20  # steps of each contender in a round, as between two log lines of the demo
WARM_UP = 2  # rounds that are not counted
PROTOCOL = "--imbalance 10 --labelled 0.1 --validation-per-class 15 --seed 0".split()
# Nothing is evaluated or saved but at the end, and no stage waits for another one's export.
ALONE = ["run.experiment=small", "loop.eval_every=null", "loop.save_every=1000000", "data.test=null"]
FRESH = {
    "arm": ["linear_probe=null"],
    "distill": ["init_from=null"],
    "semi": ["init_from=null", "model.name=vim_nano", "model.cls_token=none", "model.pool=mean"],
}


class Interleaved:
    """A stream that stops after every few batches, while something else is timed.

    Args:
        stream: The stage's first stream.
        between: Called before each round.

    Attributes:
        seconds: Mean time of a step in each round, from the request of a batch to that of the next one.
    """

    def __init__(self, stream: Loader, between: Callable[[], None]) -> None:
        self.stream, self.between = stream, between
        self.seconds: list[float] = []

    def batches(self, data_step: int) -> Iterator[Batch]:
        """Yield the stream's batches."""
        batches = self.stream.batches(data_step)
        while True:
            self.between()
            begun = time.perf_counter()
            for _ in range(STEPS):
                yield next(batches)
            self.seconds.append((time.perf_counter() - begun) / STEPS)

    def close(self) -> None:
        """Stop the readers."""
        self.stream.close()


class Bare:
    """A network in a bare loop of torch.

    Args:
        config: The stage's config, for the optimizer.
        trained: The network that learns.
        images: How many images it learns from in a step.
        average: An average of it that predicts, or none.
        inferred: How many images the average predicts.
        size: (height, width) of the images.
    """

    def __init__(
        self,
        config: StageConfig,
        trained: nn.Module,
        images: int,
        size: tuple[int, int],
        average: nn.Module | None = None,
        inferred: int = 0,
    ) -> None:
        self.trained, self.average = trained, average
        self.images, self.weak = torch.randn(images, 3, *size), torch.randn(inferred, 3, *size)
        groups = parameter_groups(cast(Trainable, trained), config.optim) if hasattr(trained, "layer_of") else None
        self.optimizer = torch.optim.AdamW(groups or trained.parameters(), lr=config.optim.lr, fused=True)
        self.clip = config.optim.clip_norm

    def step(self) -> None:
        """Take one step on noise."""
        if self.average is not None and len(self.weak):
            with torch.no_grad():
                self.average(self.weak)
        loss = self.trained(self.images).square().mean()
        loss.backward()
        if self.clip:
            torch.nn.utils.clip_grad_norm_(self.trained.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            with torch.no_grad():
                torch._foreach_lerp_(list(self.average.parameters()), list(self.trained.parameters()), 0.05)


def network_of(network: Network) -> nn.Module:
    """Build a network of a workload with random weights."""
    return ARM(network.model, network.decoder) if network.decoder else build_from_config(network.model)  # type: ignore[arg-type]


def contenders(s: StageContext[Any], flops: float, size: tuple[int, int]) -> tuple[dict[str, Bare], dict[str, float]]:
    """Return the bare loops of a stage, and the FLOPs of a step of each on this rank.

    Args:
        s: The stage.
        flops: FLOPs of the stage's step on this rank.
        size: (height, width) of its images.
    """
    workload = s.spec.workload(s.config, len(s.manifest.classes), lambda role: s.ancestry.card(role).model)
    share = s.config.loop.global_batch // s.world.size
    student, inferred = workload.student, sum(network.inferred_images for network in workload.networks)
    average = network_of(student).requires_grad_(False).eval() if workload.averages else None
    same = Bare(s.config, network_of(student), share * student.trained_images, size, average, share * inferred)
    resnet = build_model("timm/resnet18", num_classes=len(s.manifest.classes), image_size=size)
    of_one = 3 * forward_flops(resnet, size)
    images = max(1, round(flops / of_one))
    return {"bare": same, "resnet18": Bare(s.config, resnet, images, size)}, {
        "bare": flops,
        "resnet18": images * of_one,
    }


def measure(stage: str, folder: Path, rounds: int) -> dict[str, float]:
    """Run a stage with its rivals between the rounds, and return its numbers (on every rank)."""
    overrides = [*ALONE, *FRESH[stage], f"loop.steps={(rounds + WARM_UP) * STEPS + 1}", "optim.warmup_steps=1"]
    places = [
        f"run.root={folder / 'runs'}",
        f"data.train={folder / 'digits/train'}",
        f"data.split={folder / 'split.json'}",
    ]
    config = load_config(SPECS[stage].config, Path(f"configs/{stage}/demo.yaml"), [*overrides, *places])
    with StageContext(config, config.folder) as s:
        prepared, training, _ = open_stage(s)
        flops, world = training.flops / s.world.size, s.world
        bare, costs = contenders(s, flops, prepared.image_size)
        seconds: dict[str, list[float]] = {name: [] for name in bare}
        peaks: list[float] = []
        own_peaks: list[float] = []

        def between() -> None:
            for name, loop in bare.items():
                seconds[name].append(_seconds(loop.step, world))
            barrier(world)
            peaks.append(peak_flops(world.device, config.engine.precision))
            own_peaks.append(measured_flops(linear, world.device, torch.float32))
            barrier(world)

        first, *others = training.streams
        stream = Interleaved(training.streams[first], between)
        streams = {first: cast(Loader, stream), **{name: training.streams[name] for name in others}}
        fit(replace(training, streams=streams), s.run, _evaluate_nothing)
        s.run.status("complete", step=config.loop.steps, steps=config.loop.steps)
        peak = statistics.median(peaks[WARM_UP:])
        times = {"": statistics.median(stream.seconds[WARM_UP:])}
        times |= {f"{name}_": statistics.median(values[WARM_UP:]) for name, values in seconds.items()}
        costs[""] = flops
        images = {f"{name}_": len(loop.images) for name, loop in bare.items()}
        images[""] = images["bare_"]
        found = {f"step_ms_{stage}": 1e3 * times[""], f"step_vs_bare_{stage}": times[""] / times["bare_"]}
        for name, spent in times.items():
            found[f"{name}mfu_{stage}"] = costs[name.rstrip("_")] / spent / peak
            found[f"{name}images_per_second_{stage}"] = images[name] * world.size / spent
        own_peak = statistics.median(own_peaks[WARM_UP:])
        return found | {"peak_gflops": peak / 1e9, "own_peak_gflops": own_peak / 1e9}


def _seconds(work: Callable[[], Any], world: World) -> float:
    barrier(world)
    begin = time.perf_counter()
    for _ in range(STEPS):
        work()
    return (time.perf_counter() - begin) / STEPS


def _evaluate_nothing(step: int, board: Board) -> dict[str, float]:
    return {}


def main(arguments: list[str]) -> int:
    """Run the benchmark and return its exit code."""
    return guarded(_run, arguments)


def _run(words: list[str]) -> int:
    """Start two ranks for each stage and print what they measured."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.small", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=40, help="rounds of each stage that count (default 40)")
    parser.add_argument("--stages", nargs="+", choices=list(SPECS), default=list(SPECS), help="which stages (all)")
    parser.add_argument("--worker", nargs=2, metavar=("FOLDER", "STAGE"), help=argparse.SUPPRESS)
    given = parser.parse_args(words)
    if given.worker:
        folder, stage = Path(given.worker[0]), given.worker[1]
        logging.disable(logging.WARNING)
        found = measure(stage, folder, given.rounds)
        (folder / f"{stage}-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(found))
        return 0
    from launchers.local import spawn

    results: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        code = data(["convert", "digits", "--out", str(folder / "digits")])
        code = code or data(["split", str(folder / "digits/train"), "--out", str(folder / "split.json"), *PROTOCOL])
        for stage in given.stages:
            own = ["--worker", name, stage, "--rounds", str(given.rounds)]
            code = code or spawn([sys.executable, "-m", "benchmarks.small", *own], PROCESSES)
            if code:
                return code
            results |= json.loads((folder / f"{stage}-0.json").read_text())
    print(json.dumps({key: round(value, 4) for key, value in results.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
