"""What a stage hands to the drivers: `fit` trains with it, `replay` takes one step of it again."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.datasets.manifest import Manifest
from pipeline.streaming.loader import Batch, Loader
from pipeline.train.config import LoopConfig
from pipeline.train.engine import Engine
from pipeline.train.recorder import Recorder
from pipeline.train.schedules import Schedule
from pipeline.train.task import Mean, Task


@dataclass(frozen=True, kw_only=True)
class Training:
    """One prepared training: the loss, the weights, the data and the rules by which they meet.

    Args:
        task: The loss of the stage, with its teacher.
        engine: The model under training.
        streams: This rank's samples of each step, by the name of the stream.
        loop: How long to train, and how often what happens.
        lr_at: The learning rate of an optimizer step.
        accumulation: Equal micro-batches that a step is cut into.
        seed: What the randomness of every step is derived from.
        datasets: The datasets that the run reads; their shards are hashed while it trains.
        inputs: Hashes of the data and the parents, by config key; a checkpoint of other inputs is refused.
        recorder: Watches the gradients of the model and keeps the last steps.
        fingerprint_images: (n, 3, H, W), on the device; a restored checkpoint must reproduce its number on them.
        flops: FLOPs that a step must compute, over all ranks (for MFU: nothing counts twice).
        starts_trained: Whether the weights before the first step are a result, which the best validation may choose.
    """

    task: Task
    engine: Engine
    streams: Mapping[str, Loader]
    loop: LoopConfig
    lr_at: Schedule
    accumulation: int
    seed: int
    datasets: Sequence[Manifest]
    inputs: Mapping[str, str | None]
    recorder: Recorder
    fingerprint_images: Tensor
    flops: float
    starts_trained: bool = False

    def fingerprint(self) -> float:
        """Return the number that the present weights give on the fingerprint batch (collective)."""
        return self.task.fingerprint(self.engine.model, self.fingerprint_images)


class StepResult(NamedTuple):
    """What one optimizer step gives back.

    Args:
        moved: Whether the engine updated the weights.
        loss: Mean over the micro-batches, a scalar on the device.
        metrics: Named means of all micro-batches.
    """

    moved: bool
    loss: Tensor
    metrics: list[tuple[str, Mean]]


class Draws:
    """The batches of a training, step after step; a data step that does not follow the last one is a seek."""

    def __init__(self, training: Training) -> None:
        self._streams = training.streams
        self._batches: dict[str, Iterator[Batch]] = {}
        self._next = -1

    def take(self, data_step: int) -> dict[str, Batch]:
        """Return this rank's batch of every stream at `data_step`, on the device."""
        if data_step != self._next:
            self._batches = {name: stream.batches(data_step) for name, stream in self._streams.items()}
        self._next = data_step + 1
        return {name: next(batches) for name, batches in self._batches.items()}

    def close(self) -> None:
        """Stop the readers of all streams."""
        for stream in self._streams.values():
            stream.close()


def train_step(training: Training, drawn: Mapping[str, Batch], *, step: int, data_step: int) -> StepResult:
    """Take one optimizer step: the micro-batches' losses, the update, then the teacher. Reads nothing from the device."""
    task, engine, accumulation = training.task, training.engine, training.accumulation
    torch.manual_seed(step_seed(training.seed, data_step, engine.world.rank))  # drop path draws from it
    lr = training.lr_at(step)
    loss, moved = torch.zeros((), device=engine.world.device), False
    metrics: list[tuple[str, Mean]] = []
    for micro in _micro_batches(drawn, accumulation):
        with engine.precision():
            output = task.loss(engine.model, micro)
        engine.backward(output.loss)
        moved = engine.step(lr, step)
        loss += output.loss.detach() / accumulation
        metrics += output.metrics.items()
    if moved:
        metrics += task.after_step(loss).items()
    return StepResult(moved, loss, [("train/loss", Mean(loss, 1.0)), *metrics])


def step_seed(seed: int, data_step: int, rank: int) -> int:
    """Return the seed of a step: randomness is derived from where the training is, so no generator is saved."""
    digest = hashlib.blake2b(f"{seed}/{data_step}/{rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _micro_batches(drawn: Mapping[str, Batch], accumulation: int) -> list[dict[str, Batch]]:
    chunks = {name: batch.chunks(accumulation) for name, batch in drawn.items()}
    return [{name: chunk[i] for name, chunk in chunks.items()} for i in range(accumulation)]
