"""What every stage needs around its Task: world, run folder, data, engine, loop, export. A stage says only what differs."""

import logging
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.config import flatten
from pipeline.errors import Interrupted, PipelineError
from pipeline.exports.card import Card, LabelsSeen, Lineage, Parent, sample_indices_seen
from pipeline.exports.export import load_export, write_export
from pipeline.models.config import DecoderConfig, FamilyConfig
from pipeline.report.tensorboard import Board
from pipeline.streaming.loader import Loader
from pipeline.streaming.transforms import View, eval_views
from pipeline.train import distributed
from pipeline.train.engine import Engine
from pipeline.train.loop import Evaluate, fit
from pipeline.train.recorder import Recorder
from pipeline.train.replay import Replay, Replayed, replay
from pipeline.train.run import Run
from pipeline.train.schedules import warmup_cosine
from pipeline.train.sync_norm import synchronise_batch_norms
from pipeline.train.task import Task
from stages.check import check_parent, derive_batches, open_data, streams
from stages.configs import StageConfig
from stages.evaluator import Evaluator
from stages.visualize import show_attribution, show_views, spread

logger = logging.getLogger(__name__)

T = TypeVar("T", bound=Task)
NUM_PROBE_IMAGES = 4


class StageContext:
    """`with StageContext("arm", config) as setting:` joins the processes, opens the run, and closes both whatever happens.

    With `replay` the run is only read: `train` ends in Replayed, and what is written goes to a temporary folder.
    """

    def __init__(self, stage: str, config: StageConfig, replay: Replay | None = None) -> None:
        self.stage, self.config, self._replay = stage, config, replay
        self.world = distributed.start(config.engine.timeout_seconds)
        self._scratch = tempfile.TemporaryDirectory() if replay else None
        folder = Path(self._scratch.name) if self._scratch else config.run.folder(stage)
        self.run = Run(folder, config, self.world)
        self.manifest, self.split, self.parts = open_data(config)
        self._virtual_readers = config.virtual_readers(streams(config, self.parts).values())
        self.evaluator = Evaluator(config.data, self.manifest, self.split, self.parts, self.world, self.run)
        self._engine: Engine | None = None
        self._parents: list[tuple[str, Path, Card]] = []
        self._labels: dict[str, tuple[LabelsSeen, np.ndarray | None]] = {}
        self._marked = False
        torch.manual_seed(config.run.seed)  # equal weights on all ranks

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._scratch is not None:
            self._scratch.cleanup()
            return
        if error is not None:
            # No collective here: other ranks may be in the middle of one.
            if not isinstance(error, Interrupted):
                reason = (
                    str(error)
                    if isinstance(error, PipelineError)
                    else f"{type(error).__name__}: {error}".splitlines()[0]
                )
                with suppress(OSError):  # of a full disk the reason is said on the screen
                    self.run.status("failed", reason=reason)
            return
        if self._engine is not None:
            self._engine.close()
        distributed.stop()

    @property
    def measured(self) -> dict[str, float]:
        """The last validation row."""
        return self.run.last_row("val/")

    @property
    def engine(self) -> Engine:
        """There from the start of training on."""
        assert self._engine is not None
        return self._engine

    def parent(self, role: str) -> nn.Module:
        """The verified model of a parent; its labels are ours from now on."""
        folder = self.config.parents()[role]
        model, card = load_export(folder)
        self._marked |= check_parent(self.config, role, folder, card, self.manifest, self.parts)
        self._parents.append((role, folder, card))
        for seen in card.labels_seen:
            self._labels[seen.split] = (seen, sample_indices_seen(folder, seen) if seen.dataset else None)
        return model

    def parent_card(self, role: str) -> Card:
        return next(card for known, _, card in self._parents if known == role)

    def saw_external_labels(self, name: str) -> None:
        """Weights from outside were trained on labels nobody here can enumerate."""
        self._labels[name] = (
            LabelsSeen(split=name, protocol=f"whatever {name} was trained on", count=0, dataset=None),
            None,
        )
        self._marked = self._marked or self.split is not None

    def loader(
        self, sample_indices: np.ndarray, views: View, *, global_batch: int, hide_labels: bool = False
    ) -> Loader:
        """An endless stream over manifest sample_indices. Every stream shares the seed: their orders differ by their samples.

        A stream without labels is sampled uniformly: balancing its classes would tell them.
        """
        config = self.config.data.loader.model_copy(update={"virtual_readers": self._virtual_readers})
        if hide_labels:
            config = config.model_copy(update={"sampling": "uniform"})
        return Loader(
            self.manifest,
            sample_indices,
            global_batch=global_batch,
            rank=self.world.rank,
            world_size=self.world.size,
            seed=self.config.run.seed,
            views=views,
            config=config,
            hide_labels=hide_labels,
            quarantine=self.run.folder / "quarantine.jsonl",
        )

    def train(
        self,
        model: nn.Module,
        task_of: Callable[[Engine], T],
        streams: Mapping[str, Loader],
        evaluate: Evaluate,
        image_size: tuple[int, int],
        flops: float,
    ) -> T:
        """Run the loop to its last step; the engine lives on for the export.

        `flops`: what a step computes per sample of the first stream, backward included.
        """
        c = self.config
        micro_batch, accumulation = derive_batches(c.loop.global_batch, self.world.size, c.engine.micro_batch)
        recorder = Recorder(c.loop.log_every)
        if self.world.size > 1:
            synchronise_batch_norms(model)
        recorder.watch(model.to(self.world.device))
        self._engine = Engine(
            model, self.world, optim=c.optim, config=c.engine, micro_batch=micro_batch, accumulation=accumulation
        )
        task = task_of(self.engine)

        def evaluate_and_show(step: int, board: Board) -> dict[str, float]:
            row = evaluate(step, board)
            self._show(task, streams, step, board, image_size)
            return row

        fingerprint = (
            f"{self.manifest.hash} {self.split.hash if self.split else ''}"  # the config is checked by its values
        )
        lr_at = warmup_cosine(c.optim.lr, c.optim.min_lr, c.optim.warmup_steps, c.loop.steps - c.optim.cooldown_steps)
        if self._replay:
            raise Replayed(
                replay(
                    self._replay,
                    task,
                    self.engine,
                    streams,
                    steps=c.loop.steps,
                    lr_at=lr_at,
                    accumulation=accumulation,
                    fingerprint=fingerprint,
                    seed=c.run.seed,
                )
            )
        fit(
            task,
            self.engine,
            streams,
            self.run,
            loop=c.loop,
            lr_at=lr_at,
            accumulation=accumulation,
            fingerprint=fingerprint,
            seed=c.run.seed,
            evaluate=evaluate_and_show,
            recorder=recorder,
            fingerprint_images=self._probe(image_size).to(self.world.device),
            flops=flops * c.loop.global_batch,
        )
        return task

    def export(
        self,
        weights: Mapping[str, Tensor],
        *,
        model: FamilyConfig,
        decoder: DecoderConfig | None = None,
        uses_labels: bool,
        measured: dict[str, float],
        companions: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> None:
        """Write the hand-over (rank 0) and mark the run complete.

        `companions`: name -> weights of models that were trained beside it; each is exported into export-NAME.
        """
        if uses_labels:
            name = self.split.hash if self.split else f"all-{self.manifest.hash}"
            protocol = self.split.protocol if self.split else "all labels"
            seen = LabelsSeen(split=name, protocol=protocol, count=len(self.parts.labelled), dataset=self.manifest.hash)
            self._labels[name] = (seen, self.parts.labelled)
        if self.world.is_main:
            card = Card(
                kind="pretrainer" if decoder else "classifier",
                model=model,
                decoder=decoder,
                classes=() if decoder else self.manifest.classes,
                class_counts=() if decoder else tuple(self.evaluator.class_counts().tolist()),
                class_groups={}
                if decoder
                else {name: tuple(c.tolist()) for name, c in self.evaluator.groups().items()},
                eval_batch=self.config.data.eval_batch,
                preprocessing=self.config.data.preprocessing,
                weights_sha256="",
                fingerprint_sha256="",
                lineage=Lineage(
                    stage=self.stage,
                    config_sha256=self.run.config_sha256,
                    commit=self.run.commit,
                    dataset=self.manifest.hash,
                    split=self.split.hash if self.split else None,
                    parents=tuple(
                        Parent(role=role, path=str(p), weights_sha256=c.weights_sha256) for role, p, c in self._parents
                    ),
                ),
                labels_seen=tuple(seen for seen, _ in self._labels.values()),
                more_labels_than_claimed=self._marked,
                metrics=measured,
            )
            labels = {
                name: sample_indices for name, (_, sample_indices) in self._labels.items() if sample_indices is not None
            }
            fingerprint_images = self._probe(model.image_size)
            for name, others in (companions or {}).items():
                folder = self.run.folder / f"export-{name}"
                write_export(folder, card=card, weights=others, fingerprint_images=fingerprint_images, labels=labels)
            write_export(
                self.run.export, card=card, weights=weights, fingerprint_images=fingerprint_images, labels=labels
            )
            logger.info("exported %s", self.run.export)
            board = Board(self.run.folder / "tb", self.config.loop.steps, self.config.loop.global_batch)
            board.hparams(flatten(self.config.model_dump(mode="json")), measured, self.config.loop.steps)
            board.close()
        self.run.status("complete", step=self.config.loop.steps, steps=self.config.loop.steps)

    def _show(
        self, task: Task, streams: Mapping[str, Loader], step: int, board: Board, image_size: tuple[int, int]
    ) -> None:
        """For people, on rank 0 alone, a second or two. Under ZeRO-3 no rank has the whole model, so only the views are drawn."""
        if not self.world.is_main:
            return
        for name, confidence in self.evaluator.confidence.items():
            board.histogram(f"val/{name}", confidence, step)
        look, held_out = self.config.data.preprocessing, self.parts.validation
        model = self.engine.module if self.config.engine.zero_stage < 3 else None
        show_views(board, step, task, model, streams, self.manifest, look)
        if model is not None and self.manifest.classes and task.names_classes and len(held_out):
            show_attribution(board, step, model, self.manifest, held_out, image_size, look)

    def pictures(self, sample_indices: np.ndarray, number: int, image_size: tuple[int, int]) -> Tensor:
        """The same `number` images, spread over `sample_indices`, on every rank: (number, 3, H, W)."""
        view = eval_views(image_size, mean=self.config.data.mean, std=self.config.data.std)
        return spread(self.manifest, sample_indices, number, view).images.to(self.world.device)

    def _probe(self, image_size: tuple[int, int]) -> Tensor:
        sample_indices = self.parts.validation if len(self.parts.validation) else self.parts.labelled
        return self.pictures(sample_indices, NUM_PROBE_IMAGES, image_size).cpu()
