"""The two drivers of a stage: `train` runs it to its export, `replay` takes one step of it again.

A stage's module has a function `prepare(s) -> Prepared`, which builds what the stage brings. Both drivers make the same
`Training` of it.
"""

import importlib
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from torch import nn

from pipeline.models.backbone.config import WHOLE, BackboneConfig
from pipeline.models.vision_mamba.mixer import Mixer
from pipeline.report.tensorboard import Board
from pipeline.streaming.transforms import View
from pipeline.train.best import Best
from pipeline.train.distributed import agree_on_scan, from_main
from pipeline.train.engine import Engine
from pipeline.train.loop import Evaluate, fit
from pipeline.train.recorder import Recorder
from pipeline.train.replay import Replay
from pipeline.train.replay import replay as take_again
from pipeline.train.schedules import learning_rate
from pipeline.train.sync_norm import synchronise_batch_norms
from pipeline.train.task import Task
from pipeline.train.training import Training
from stages import spec_of
from stages.configs.base import StageConfig
from stages.context import StageContext
from stages.features import use_cached_features
from stages.identity import inputs_of
from stages.visualize import show_attribution, show_views

T = TypeVar("T", bound=Task)


@dataclass(frozen=True, kw_only=True)
class Prepared(Generic[T]):
    """What a stage brings to its training.

    Attributes:
        model: The model to train, on the CPU.
        make_task: Makes the Task around the engine that holds the model.
        views: The transform of each stream's images.
        image_size: (height, width) in pixels.
        flops: FLOPs of a step per sample of the first stream, backward included.
        evaluate: Called by all ranks with the step and the board; returns numbers for the log.
        finish: Called by all ranks after the last step; evaluates and exports.
        backbone: Which part of the model trains, and whether the features of the rest are cached.
        starts_trained: Whether every weight comes from a trained model, the head's too.
        guesses: Labels of all samples of the manifest, which streams give in place of hidden ones.
    """

    model: nn.Module
    make_task: Callable[[Engine], T]
    views: Mapping[str, View]
    image_size: tuple[int, int]
    flops: int
    evaluate: Evaluate
    finish: Callable[[T], None]
    backbone: BackboneConfig = WHOLE
    starts_trained: bool = False
    guesses: np.ndarray | None = None


def train(config: StageConfig) -> None:
    """Run a stage to its last step, continuing from its newest checkpoint, and export the result.

    Raises:
        PipelineError: What the stage ends in, if it does not complete.
    """
    with StageContext(config, config.folder) as s:
        s.run.follow(config.run.tracker)
        prepared, training, task = open_stage(s)

        def evaluate(step: int, board: Board) -> dict[str, float]:
            if task.teacher:
                task.teacher.refresh()
            row = prepared.evaluate(step, board)
            _show(s, training, step, board, prepared.image_size)
            return row

        ending = fit(training, s.run, evaluate)
        if s.ended(ending) and task.best:
            task.best.adopt()
        prepared.finish(task)
        s.run.status("complete", step=ending.step, steps=ending.steps)


def replay(config: StageConfig, asked: Replay) -> str:
    """Take one data step of a run again. The run is only read; what is written goes to a temporary folder.

    Returns:
        A sentence that names the first value that is not finite.
    """
    with tempfile.TemporaryDirectory() as scratch, StageContext(config, Path(scratch)) as s:
        _, training, _ = open_stage(s)
        return take_again(training, asked)


def open_stage(s: StageContext[Any]) -> tuple[Prepared[Any], Training, Task]:
    """Let the stage prepare, open engine and streams, and put the training together; `fit` can drive the training."""
    prepared: Prepared[Any] = importlib.import_module(spec_of(s.config).module).prepare(s)
    streams = s.loaders(prepared.views, prepared.guesses)
    loop = s.config.loop
    recorder = Recorder(loop.log_every)
    if s.world.size > 1 and s.config.engine.sync_batch_norm:
        synchronise_batch_norms(prepared.model, s.world.device)
    if (
        s.world.size > 1
        and s.world.device.type == "cuda"
        and any(isinstance(m, Mixer) for m in prepared.model.modules())
    ):
        agree_on_scan(s.world)
    recorder.watch(prepared.model.to(s.world.device))
    if prepared.backbone.cached_views:  # before the engine may shard the weights
        use_cached_features(s, prepared.model, streams, prepared.backbone)
    engine = s.open_engine(prepared.model)
    task = prepared.make_task(engine)
    if loop.select == "best":
        task.best = Best(engine, task)
    training = Training(
        task=task,
        engine=engine,
        streams=streams,
        loop=loop,
        lr_at=learning_rate(s.config.optim, loop.steps),
        accumulation=s.batches()[1],
        seed=s.config.run.seed,
        datasets=s.datasets(),
        inputs=from_main(inputs_of(s.config, s.manifest) if s.world.is_main else {}, s.world),
        recorder=recorder,
        fingerprint_images=s.fingerprint_images(prepared.image_size).to(s.world.device),
        flops=prepared.flops * loop.global_batch,
        starts_trained=prepared.starts_trained,
    )
    return prepared, training, task


def _show(s: StageContext[Any], training: Training, step: int, board: Board, image_size: tuple[int, int]) -> None:
    """Draw what the model sees, on rank 0 alone. Under ZeRO-3 no rank of several has the whole model, so it draws only views."""
    if not s.world.is_main:
        return
    for name, confidence in s.evaluator.confidence.items():
        board.histogram(f"val/{name}", confidence, step)
    task, look, held_out = training.task, s.config.data.preprocessing, s.data.held_out
    model = training.engine.module if training.engine.config.zero_stage < 3 else None
    show_views(board, step, task, model, training.streams, s.manifest, look)
    if model is not None and s.manifest.classes and task.names_classes and len(held_out.sample_indices):
        show_attribution(board, step, model, *held_out, image_size, look, s.config.data.loader.remote)
