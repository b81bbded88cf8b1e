"""Counts collectives and opened files of the real engine, saver and restore, in a process group that only pretends.

torch's fake group claims any number of ranks and returns at once from each collective. So one process can be rank 0 of 512, the
rank that does the most: it writes for all and reads for all. The model is a small one. The number of its collectives depends on
DeepSpeed's buckets and on the number of tensors, but not on their sizes as long as they fit one bucket.
"""

import os
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.models import build_model
from pipeline.ssl.config import LyapEMAConfig
from pipeline.ssl.teacher import Teacher
from pipeline.train import checkpoint, distributed
from pipeline.train.checkpoint import Saver
from pipeline.train.config import EngineConfig, LoopConfig, OptimConfig
from pipeline.train.engine import Engine
from pipeline.train.recorder import Recorder
from pipeline.train.saved_state import LoopRecord
from pipeline.train.task import Task
from pipeline.train.training import Training

ZeroStage = Literal[0, 1, 2, 3]
STAND_IN, SIZE, LR = "vim_nano", 32, 1e-3


@dataclass(frozen=True)
class Seen:
    """What rank 0 does.

    Attributes:
        step: Collectives of an optimizer step with a teacher.
        save: Collectives of a save.
        restore: Collectives of a restore.
        opened: Files that the restore opens, each time it does.
    """

    step: int
    save: int
    restore: int
    opened: int


class _Collectives(TorchDispatchMode):
    """Counts the calls of torch's process groups while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += function.namespace == "c10d"
        return function(*args, **(kwargs or {}))


_opened: Counter[str] | None = None


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _opened is not None and isinstance(arguments[0], str):
        _opened[arguments[0]] += 1


@contextmanager
def _opens() -> Iterator[Counter[str]]:
    """While inside, count the files that Python opens."""
    global _opened
    _opened = Counter()
    try:
        yield _opened
    finally:
        _opened = None


def count(world_size: int, zero_stages: set[ZeroStage]) -> dict[ZeroStage, Seen]:
    """Count what rank 0 of `world_size` does at some ZeRO stages.

    A checkpoint is written at ZeRO 0, so that one file holds it, and read at each stage.
    """
    os.environ |= {"LOCAL_RANK": "0", "DS_ACCELERATOR": "cpu"}
    deepspeed = distributed.quiet_deepspeed()
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        deepspeed.init_distributed(dist_backend="fake", verbose=False)
        world = distributed.World(0, world_size, torch.device("cpu"))
        with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the group has no time-outs, and DeepSpeed's calls have newer names
            whole = _training(world, 0)
            _step(whole)
            with _Collectives() as saving:
                Saver(Path(name), whole).save(1, LoopRecord(left_out=[], rewinds=0, fingerprint=0.0))
            whole.engine.close()
            return {zero: _count(world, zero, Path(name), saving.number) for zero in sorted(zero_stages)}
    finally:
        dist.destroy_process_group()
        deepspeed.comm.comm.cdb = None  # DeepSpeed keeps the group that it has met first
        deepspeed.utils.groups._WORLD_GROUP = None


def _count(world: distributed.World, zero: ZeroStage, folder: Path, save: int) -> Seen:
    training = _training(world, zero)
    with _Collectives() as step:
        _step(training)
    with _Collectives() as restore, _opens() as opened:
        checkpoint.restore(folder, training)
    training.engine.close()
    return Seen(step.number, save, restore.number, sum(n for path, n in opened.items() if path.startswith(str(folder))))


def _step(training: Training) -> None:
    loss = training.engine.model(torch.zeros(2, 3, SIZE, SIZE)).square().mean()
    training.engine.backward(loss)
    training.engine.step(LR)
    training.task.after_step(loss.detach())


def _training(world: distributed.World, zero: ZeroStage) -> Training:
    torch.manual_seed(0)
    model, copy = build_model(STAND_IN, num_classes=10), build_model(STAND_IN, num_classes=10)
    config = EngineConfig(zero_stage=zero, bucket_bytes=2**30)  # AdamW: what Muon sends is in the plan alone
    engine = Engine(model, world, optim=OptimConfig(lr=LR), config=config, micro_batch=2, accumulation=1)
    task = Task()
    task.teacher = Teacher(engine, copy, LyapEMAConfig())
    return Training(
        task=task,
        engine=engine,
        streams={},
        loop=LoopConfig(steps=2, global_batch=2 * world.size, background_save=False),
        lr_at=lambda step: LR,
        accumulation=1,
        seed=0,
        datasets=(),
        inputs={},
        recorder=Recorder(1),
        fingerprint_images=torch.zeros(1, 3, SIZE, SIZE),
        flops=0.0,
    )


sys.addaudithook(_note)
