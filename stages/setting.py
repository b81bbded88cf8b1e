"""What every stage needs around its Task: world, run folder, data, engine, loop, export. A stage says only what differs."""

import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.config import flatten
from pipeline.data.imbalance import class_groups
from pipeline.data.loader import Batch, Loader, evaluation_batches
from pipeline.data.manifest import Manifest, read_manifest
from pipeline.data.transforms import View, eval_views
from pipeline.errors import Interrupted, PipelineError
from pipeline.evaluate import metrics
from pipeline.evaluate.answers import Answers, ask
from pipeline.evaluate.gradcam import gradcam, overlay
from pipeline.evaluate.open_set import with_outside
from pipeline.models.card import Card, LabelsSeen, Lineage, Parent, positions_seen
from pipeline.models.config import DecoderConfig, FamilyConfig
from pipeline.models.export import load_export, write_export
from pipeline.observe.pictures import captioned, to_pixels
from pipeline.observe.tensorboard import Board
from pipeline.train import distributed
from pipeline.train.engine import Engine
from pipeline.train.loop import Evaluate, fit
from pipeline.train.recorder import Recorder
from pipeline.train.replay import Replay, Replayed, replay
from pipeline.train.run import Run
from pipeline.train.schedules import warmup_cosine
from pipeline.train.sync_norm import synchronise_batch_norms
from pipeline.train.task import Task
from stages.check import check_parent, derive_batches, open_data
from stages.configs import StageConfig

logger = logging.getLogger(__name__)

T = TypeVar("T", bound=Task)
NUM_PROBE_IMAGES = 4
NUM_PICTURES = 8


class Setting:
    """`with Setting("arm", config) as setting:` joins the processes, opens the run, and closes both whatever happens.

    With `replay` the run is only read: `train` ends in Replayed, and what is written goes to a temporary folder.
    """

    def __init__(self, stage: str, config: StageConfig, replay: Replay | None = None) -> None:
        self.stage, self.config, self._replay = stage, config, replay
        self.world = distributed.start(config.engine.timeout_seconds)
        self._scratch = tempfile.TemporaryDirectory() if replay else None
        folder = Path(self._scratch.name) if self._scratch else config.run.folder(stage)
        self.run = Run(folder, config, self.world)
        self.manifest, self.split, self.parts = open_data(config)
        self._engine: Engine | None = None
        self._parents: list[tuple[str, Path, Card]] = []
        self._labels: dict[str, tuple[LabelsSeen, np.ndarray | None]] = {}
        self._marked = False
        self._confidence: dict[str, np.ndarray] = {}  # of each model in the last validation
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
            self._labels[seen.split] = (seen, positions_seen(folder, seen) if seen.dataset else None)
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

    def loader(self, positions: np.ndarray, views: View, *, global_batch: int, hide_labels: bool = False) -> Loader:
        """An endless stream over manifest positions. Every stream shares the seed: their orders differ by their samples.

        A stream without labels is sampled uniformly: balancing its classes would tell them.
        """
        config = self.config.data.loader
        if hide_labels:
            config = config.model_copy(update={"sampling": "uniform"})
        return Loader(
            self.manifest,
            positions,
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
            probe_images=self._probe(image_size).to(self.world.device),
            flops=flops * c.loop.global_batch,
        )
        return task

    def evaluation(self, manifest: Manifest, positions: np.ndarray, image_size: tuple[int, int]) -> Iterator[Batch]:
        """Every sample once over the ranks, as many batches on each."""
        views = eval_views(image_size, mean=self.config.data.mean, std=self.config.data.std)
        return evaluation_batches(
            manifest,
            positions,
            batch_size=self.config.data.eval_batch,
            rank=self.world.rank,
            world_size=self.world.size,
            views=views,
            workers=self.config.data.loader.workers,
            remote=self.config.data.loader.remote,
        )

    def answers(
        self, model: nn.Module, manifest: Manifest, positions: np.ndarray, image_size: tuple[int, int]
    ) -> Answers:
        """Of a classifier to samples of a manifest (collective), in fp32: what an export will say."""
        return ask(model, self.evaluation(manifest, positions, image_size), self.world.device)

    def groups(self) -> dict[str, np.ndarray]:
        """Head, medium and tail by the images that follow the split's tail; classes that it leaves out stand apart.

        Unlabelled images count too, by their hidden labels: a tenth of the labels alone is full of ties. No loss sees them.
        """
        num_classes = len(self.manifest.classes)
        if self.split is None:
            return class_groups(self.class_counts())
        header, counts = self.split.header, self.split.counts("labelled")
        if header["config"]["scope"] == "both":
            counts = counts + self.split.counts("unlabelled")
        seen = np.setdiff1d(np.arange(num_classes), header["ood_classes"])
        return with_outside(class_groups(counts[seen], ranks=np.array(header["class_ranks"])[seen]), seen, num_classes)

    def class_counts(self) -> np.ndarray:
        """(C,) labelled images of each class."""
        return np.bincount(self.manifest.labels[self.parts.labelled], minlength=len(self.manifest.classes))

    def validate(self, models: Mapping[str, nn.Module], image_size: tuple[int, int]) -> dict[str, float]:
        """val/top1, val/tail, ... of each model on the validation part; names other than `student` are prefixed."""
        row = {}
        if len(self.parts.validation):
            for name, model in models.items():
                answers = self.answers(model, self.manifest, self.parts.validation, image_size)
                prefix = "" if name == "student" else f"{name}_"
                self._confidence[f"{prefix}confidence"] = answers.confidence
                found = metrics.summary(answers, len(self.manifest.classes), self.groups())
                row.update({f"val/{prefix}{k}": v for k, v in found.items()})
        return row

    def test(self, models: Mapping[str, nn.Module], image_size: tuple[int, int]) -> dict[str, float]:
        """Judge once on the test set, or on the validation part if there is none; writes evaluation.json and every answer.

        Returns the test set's top1 of each model, for the card.
        """
        if self.config.data.test is not None:
            test, judged_on = read_manifest(self.config.data.test), "test images"
            positions = np.arange(test.num_samples)
        else:
            test, judged_on, positions = (
                self.manifest,
                "validation images, for want of a test set",
                self.parts.validation,
            )
        if not len(positions):
            return {}
        results = {}
        for name, model in models.items():
            answers = self.answers(model, test, positions, image_size)
            results[name] = metrics.report(answers, self.groups(), test.classes)
            if self.world.is_main:
                answers.save(self.run.folder / f"answers-{name}.npz")
        protocol = {
            "dataset": test.hash,
            "judged_on": judged_on,
            "split": self.split.hash if self.split else None,
            "protocol": self.split.protocol if self.split else "all labelled",
        }
        counts = dict(zip(self.manifest.classes, self.class_counts().tolist(), strict=True))
        self.run.write_json("evaluation.json", {**protocol, "labelled_per_class": counts, "models": results})
        if self.config.data.test is None:
            return {}
        return {f"test/{name}_top1": result["top1"] for name, result in results.items()}

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
                class_counts=() if decoder else tuple(self.class_counts().tolist()),
                class_groups={} if decoder else {name: tuple(c.tolist()) for name, c in self.groups().items()},
                eval_batch=self.config.data.eval_batch,
                preprocessing=self.config.data.preprocessing,
                weights_sha256="",
                probe_sha256="",
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
            labels = {name: positions for name, (_, positions) in self._labels.items() if positions is not None}
            probe_images = self._probe(model.image_size)
            for name, others in (companions or {}).items():
                folder = self.run.folder / f"export-{name}"
                write_export(folder, card=card, weights=others, probe_images=probe_images, labels=labels)
            write_export(self.run.export, card=card, weights=weights, probe_images=probe_images, labels=labels)
            logger.info("exported %s", self.run.export)
            board = Board(self.run.folder / "tb", self.config.loop.steps, self.config.loop.global_batch)
            board.hparams(flatten(self.config.model_dump(mode="json")), measured, self.config.loop.steps)
            board.close()
        self.run.status("complete", step=self.config.loop.steps, steps=self.config.loop.steps)

    def _show(
        self, task: Task, streams: Mapping[str, Loader], step: int, board: Board, image_size: tuple[int, int]
    ) -> None:
        """For people: views as they are trained on, where the model looks, how sure it is. Rank 0 alone, a second or two.

        Under ZeRO-3 no rank has the whole model, so only the views are drawn.
        """
        if not self.world.is_main:
            return
        mean, std = self.config.data.mean, self.config.data.std
        for name, confidence in self._confidence.items():
            board.histogram(f"val/{name}", confidence, step)
        whole = self.config.engine.zero_stage < 3
        for name, stream in streams.items():
            batch = self._first(stream.order.positions, NUM_PICTURES, stream.views)
            captions = task.captions(self.engine.module, batch) if whole else None
            views = {"view": batch.images} if batch.strong is None else {"weak": batch.images, "strong": batch.strong}
            pixels = [to_pixels(view, mean, std) for view in views.values()]
            words = captions or [""] * len(batch)
            board.image(f"views/{name}", captioned(pixels, list(views), [words, [""] * len(batch)]), step)
        if whole and self.manifest.classes and task.names_classes and len(self.parts.validation):
            batch = self._first(self.parts.validation, NUM_PICTURES, eval_views(image_size, mean=mean, std=std))
            try:  # the bare module: a backward pass through DeepSpeed's wrapper is a step to it
                maps, answers = gradcam(self.engine.module, batch.images.to(self.world.device))
            except (PipelineError, RuntimeError, IndexError) as error:  # a layout nobody foresaw: no reason to stop
                logger.warning("no attribution maps: %s", error)
                return
            pairs = zip(answers.tolist(), batch.labels.tolist(), strict=True)
            said = [
                f"{self.manifest.classes[a]}{'' if a == t else f' (is {self.manifest.classes[t]})'}" for a, t in pairs
            ]
            rows = [to_pixels(batch.images, mean, std), overlay(batch.images, maps.cpu(), mean, std)]
            board.image("attribution", captioned(rows, ["image", "Grad-CAM"], [said, [""] * len(said)]), step)

    def pictures(self, positions: np.ndarray, number: int, image_size: tuple[int, int]) -> Tensor:
        """The same `number` images, spread over `positions`, on every rank: (number, 3, H, W)."""
        views = eval_views(image_size, mean=self.config.data.mean, std=self.config.data.std)
        return self._first(positions, number, views).images.to(self.world.device)

    def _first(self, positions: np.ndarray, number: int, views: View) -> Batch:
        """`number` samples spread over `positions`, alike on every rank."""
        spread = positions[np.linspace(0, len(positions) - 1, min(number, len(positions))).astype(int)]
        batches = evaluation_batches(self.manifest, spread, batch_size=len(spread), rank=0, world_size=1, views=views)
        return next(iter(batches))

    def _probe(self, image_size: tuple[int, int]) -> Tensor:
        positions = self.parts.validation if len(self.parts.validation) else self.parts.labelled
        return self.pictures(positions, NUM_PROBE_IMAGES, image_size).cpu()
