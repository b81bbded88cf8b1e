"""The cost of the engine: `python -m benchmarks.engine` prints one JSON line last.

Two processes of one thread each take interleaved steps; the numbers are medians:
- step_vs_bare_loop: a step of `fit` over a step of a bare loop beside it, each on its own engine (Vim-Tiny at 224); the
  median over the pairs, with its quartiles;
- zero1_vs_ddp: our engine at ZeRO-1 over DistributedDataParallel and AdamW (timm's ViT-Tiny at 224, 8 images per process);
- save_stall_vs_step: the longest step of `fit` while a checkpoint of a 26 M model (Vim-Small) is copied and written in the
  background, over the median step without a save;
- resume_seconds: from the call to the checked fingerprint, for 98 M weights (Vim-Base) with moments, hashes checked.
"""

import argparse
import json
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.cli import guarded
from pipeline.config import Strict
from pipeline.models import build_model
from pipeline.report.tensorboard import Board
from pipeline.streaming.batch import Batch
from pipeline.streaming.loader import Loader
from pipeline.train import checkpoint, distributed
from pipeline.train.checkpoint import Saver
from pipeline.train.config import EngineConfig, LoopConfig, OptimConfig
from pipeline.train.distributed import World, barrier
from pipeline.train.engine import Engine
from pipeline.train.loop import fit
from pipeline.train.optim import Trainable, parameter_groups
from pipeline.train.recorder import Recorder
from pipeline.train.run import Run
from pipeline.train.saved_state import LoopRecord
from pipeline.train.task import StepOutput, Task, mean_of
from pipeline.train.training import Training

OPTIM = OptimConfig(lr=1e-4, clip_norm=1.0)
SIZE = 224
SAVE_EVERY = 8


class Classify(Task):
    """Plain classification."""

    def loss(self, model: nn.Module, batch: Mapping[str, Batch]) -> StepOutput:
        """Return the cross-entropy of the labelled batch."""
        images, labels = batch["labelled"].images, batch["labelled"].labels
        logits = model(images)
        loss = F.cross_entropy(logits, labels)
        return StepOutput(loss=loss, metrics={"train/top1": mean_of(100.0 * (logits.argmax(-1) == labels))})


class Timed:
    """A stream that repeats one batch and takes the time until `fit` asks for the next.

    Args:
        batch: What it yields.
        between: Something to time between two steps; it returns seconds.
    """

    def __init__(self, batch: Batch, between: Callable[[], float] | None = None) -> None:
        self.batch, self.between = batch, between
        self.steps: list[float] = []
        self.others: list[float] = []

    def batches(self, data_step: int) -> Iterator[Batch]:
        """Yield the batch without end."""
        while True:
            if self.between:
                self.others.append(self.between())
            given = time.perf_counter()
            yield self.batch
            self.steps.append(time.perf_counter() - given)

    def close(self) -> None:
        """Do nothing."""


class Values(Strict):
    """The empty config of these runs."""


def batch_of(size: int) -> Batch:
    """Return a batch of random images."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(size, 3, SIZE, SIZE, generator=generator)
    return Batch(images=images, labels=torch.arange(size) % 10, indices=torch.arange(size), virtual_readers=1)


def engine_of(model: nn.Module, world: World, size: int, zero_stage: int = 1) -> Engine:
    """Return an engine for micro-batches of `size`, without accumulation."""
    config = EngineConfig(zero_stage=zero_stage)  # type: ignore[arg-type]
    return Engine(model, world, optim=OPTIM, config=config, micro_batch=size, accumulation=1)


def run_fit(
    engine: Engine, stream: Timed, folder: Path, world: World, recorder: Recorder, *, steps: int, save_every: int
) -> None:
    """Run the real loop on one batch."""
    loop = LoopConfig(steps=steps, global_batch=len(stream.batch) * world.size, log_every=10, save_every=save_every)

    def nothing(step: int, board: Board) -> dict[str, float]:
        return {}

    fit(training_of(engine, stream, recorder, loop), Run(folder, Values(), world), nothing)


def training_of(engine: Engine, stream: Timed, recorder: Recorder, loop: LoopConfig) -> Training:
    """Return a classification that `fit` can drive."""
    return Training(
        task=Classify(),
        engine=engine,
        streams={"labelled": cast(Loader, stream)},
        loop=loop,
        lr_at=lambda step: OPTIM.lr,
        accumulation=1,
        seed=0,
        datasets=(),
        inputs={},
        recorder=recorder,
        fingerprint_images=stream.batch.images[:2],
        flops=1.0,
    )


def fit_against_bare(world: World, folder: Path, pairs: int) -> dict[str, float]:
    """Time steps of `fit` and of a bare loop in turn."""
    size, task = 4, Classify()
    batch = batch_of(size)
    torch.manual_seed(0)
    recorder, watched = Recorder(log_every=50), build_model("vim_tiny", num_classes=10)
    recorder.watch(watched)
    bare_engine, our_engine = (
        engine_of(build_model("vim_tiny", num_classes=10), world, size),
        engine_of(watched, world, size),
    )
    deepspeed = cast(Any, bare_engine.model)

    def bare() -> float:
        begin = time.perf_counter()
        loss = task.loss(deepspeed, {"labelled": batch}).loss
        deepspeed.backward(loss)
        deepspeed.step()
        return time.perf_counter() - begin

    stream = Timed(batch, bare)
    run_fit(our_engine, stream, folder / "bare", world, recorder, steps=pairs + 3, save_every=10**6)
    ours, others = stream.steps[2:], stream.others[2 : 2 + len(stream.steps[2:])]
    ratios = [a / b for a, b in zip(ours, others, strict=True)]
    quarters = statistics.quantiles(ratios, n=4)
    return {
        "step_vs_bare_loop": statistics.median(ratios),
        "step_vs_bare_loop_of_medians": statistics.median(ours) / statistics.median(others),
        "step_vs_bare_loop_q1": quarters[0],
        "step_vs_bare_loop_q3": quarters[2],
        "step_pairs": len(ratios),
        "bare_step_ms": 1e3 * statistics.median(others),
    }


def zero_against_ddp(world: World, pairs: int) -> dict[str, float]:
    """Time steps at ZeRO-1 and under DistributedDataParallel in turn."""
    size = 8
    batch = batch_of(size)
    engine = engine_of(build_model("timm/vit_tiny_patch16_224", num_classes=10), world, size)
    rival = build_model("timm/vit_tiny_patch16_224", num_classes=10)
    ddp = DistributedDataParallel(rival)
    adamw = torch.optim.AdamW(parameter_groups(cast(Trainable, rival), OPTIM), lr=OPTIM.lr)

    def ours() -> None:
        engine.backward(F.cross_entropy(engine.model(batch.images), batch.labels))
        engine.step(OPTIM.lr)

    def theirs() -> None:
        F.cross_entropy(ddp(batch.images), batch.labels).backward()
        torch.nn.utils.clip_grad_norm_(ddp.parameters(), OPTIM.clip_norm)
        adamw.step()
        adamw.zero_grad()

    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(pairs + 2):
        for name, step in (("ours", ours), ("theirs", theirs)):
            begin = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - begin)
    own, other = (statistics.median(times[name][2:]) for name in ("ours", "theirs"))
    return {"zero1_vs_ddp": own / other, "ddp_step_ms": 1e3 * other}


def saving(world: World, folder: Path, saves: int) -> dict[str, float]:
    """Time steps with and without a background save."""
    size = 2
    recorder, model = Recorder(log_every=50), build_model("vim_small", num_classes=10)
    recorder.watch(model)
    engine, stream = engine_of(model, world, size), Timed(batch_of(size))
    run_fit(engine, stream, folder / "save", world, recorder, steps=SAVE_EVERY * (saves + 1), save_every=SAVE_EVERY)
    # The time of step k includes what `fit` does after it. The steps SAVE_EVERY - 1, 2 SAVE_EVERY - 1, ... copy the shards.
    # The first half of each interval after them runs beside the writing and ends when a vote completes it.
    busy = [t for k, t in enumerate(stream.steps) if k >= SAVE_EVERY - 1 and (k + 1) % SAVE_EVERY <= SAVE_EVERY // 2]
    quiet = [t for k, t in enumerate(stream.steps) if k >= 2 and (k + 1) % SAVE_EVERY > SAVE_EVERY // 2]
    median = statistics.median(quiet)
    weights = sum(p.numel() for _, p in engine.named_parameters)
    return {"save_stall_vs_step": max(busy) / median, "saving_step_ms": 1e3 * median, "saved_weights_m": weights / 1e6}


def resuming(world: World, folder: Path) -> dict[str, float]:
    """Time the restore of a large checkpoint."""
    engine, batch = engine_of(build_model("vim_base", num_classes=10), world, 1), batch_of(1)
    loop = LoopConfig(steps=1, global_batch=world.size, background_save=False)
    training = training_of(engine, Timed(batch), Recorder(log_every=50), loop)
    engine.backward(training.task.loss(engine.model, {"labelled": batch}).loss)
    engine.step(OPTIM.lr)
    Saver(folder, training).save(1, LoopRecord(left_out=[], rewinds=0, fingerprint=0.0))
    barrier(world)
    begin = time.perf_counter()
    found = checkpoint.restore(folder, training)
    training.fingerprint()
    barrier(world)
    assert found is not None
    assert found.step == 1
    gigabytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e9
    return {"resume_seconds": time.perf_counter() - begin, "resume_gigabytes": gigabytes}


def worker(folder: Path, pairs: int, saves: int) -> None:
    """Measure everything on one rank."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    world = distributed.start(600)
    found = fit_against_bare(world, folder, pairs)
    found |= zero_against_ddp(world, pairs)
    found |= saving(world, folder, saves)
    found |= resuming(world, folder / "resume")
    if world.is_main:
        (folder / "found.json").write_text(json.dumps(found))
    distributed.stop()


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark and return its exit code."""
    return guarded(_run, arguments)


def _run(words: list[str]) -> int:
    """Start two ranks and print what they measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=40, help="interleaved pairs of steps (default 40)")
    parser.add_argument("--saves", type=int, default=4, help="checkpoints written beside the training (default 4)")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(words)
    if given.worker:
        worker(given.worker, given.pairs, given.saves)
        return 0
    from launchers.local import spawn

    with tempfile.TemporaryDirectory() as name:
        amounts = ["--pairs", str(given.pairs), "--saves", str(given.saves)]
        code = spawn([sys.executable, "-m", "benchmarks.engine", "--worker", name, *amounts], 2)
        if code:
            return code
        found = json.loads((Path(name) / "found.json").read_text())
    print(json.dumps({key: round(value, 4) for key, value in found.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
