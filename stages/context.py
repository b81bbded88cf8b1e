"""What every stage needs around its Task: the processes, the run folder, the data, the parents, the evaluator."""

import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Generic, Self

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.datasets.manifest import Manifest
from pipeline.datasets.opening import open_dataset
from pipeline.errors import Interrupted, PipelineError, first_line
from pipeline.exports.selected import Selected
from pipeline.models.family import FamilyConfig
from pipeline.models.flops import forward_flops
from pipeline.models.losses import class_weights
from pipeline.streaming.loader import Loader
from pipeline.streaming.transforms import View, eval_views
from pipeline.train import distributed, node
from pipeline.train.engine import Engine
from pipeline.train.loop import Ending
from pipeline.train.run import Run
from stages import spec_of
from stages.check import derive_batches, open_data
from stages.configs.base import ClassWeightsConfig
from stages.evaluator import Evaluator
from stages.lineage import Ancestry
from stages.spec import C, Held, in_words
from stages.visualize import spread

logger = logging.getLogger(__name__)

NUM_FINGERPRINT_IMAGES = 4


def with_workers(config: C, cores: int) -> C:
    """Return a config with no more data workers per rank than it has cores: more would only take turns on them."""
    loader = config.data.loader
    if loader.workers <= cores:
        return config
    logger.info("%d data workers per rank in place of %d: a rank has %d cores", cores, loader.workers, cores)
    data = config.data.model_copy(update={"loader": loader.model_copy(update={"workers": cores})})
    return config.model_copy(update={"data": data})


class StageContext(Generic[C]):
    """`with StageContext(config, folder) as s:` joins the processes, opens the run, and closes both in any case.

    If the block raises, the run's status says why.

    Args:
        config: The stage's config.
        folder: The run's folder; a replay gives a temporary one.

    Attributes:
        config: The stage's config, with no more data workers than a rank has cores.
        spec: The stage's spec.
        world: This process and the others.
        run: The run's folder.
        data: The training data with its split and subsets, and the validation set.
        manifest: The training manifest; `split` and `subsets` belong to it.
        streams: The streams of the spec, first stream first.
        ancestry: The parents and the labels seen.
        evaluator: Evaluates the stage's models.
        selected: Which state of the run its result is, once `finish` may export it.
    """

    def __init__(self, config: C, folder: Path) -> None:
        cores = node.cores_of_rank(os.environ)  # before the process may be bound to fewer
        self.spec = spec_of(config)
        engine = config.engine
        self.world = distributed.start(engine.timeout_seconds, engine.public_address, engine.bind_cores)
        self.run = Run(folder, config, self.world)
        self.config = config = with_workers(config, cores)
        self.data = open_data(config)
        self.manifest, self.split, self.subsets = self.data.manifest, self.data.split, self.data.subsets
        self.streams = self.spec.streams(config, self.subsets)
        self.ancestry = Ancestry(config, self.manifest, self.split, self.subsets, self.world)
        self.evaluator = Evaluator(config.data, self.data, self.world, self.run)
        self.selected = Selected(
            select="last", step=config.loop.steps, trained=config.loop.steps, steps=config.loop.steps
        )
        self._engine: Engine | None = None
        torch.manual_seed(config.run.seed)  # equal weights on all ranks
        logger.info("%s", in_words(self.data.labels()))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        interrupted = isinstance(error, Interrupted)
        self.run.close_tracker("interrupted" if interrupted else "failed" if error else "complete")
        if error is None:
            if self._engine is not None:
                self._engine.close()
            distributed.stop()
        elif not interrupted:
            # No collective here: other ranks may be in the middle of one.
            words = str(error) if isinstance(error, PipelineError) else f"{type(error).__name__}: {first_line(error)}"
            if isinstance(error, KeyboardInterrupt):
                words = "stopped at once by Ctrl-C; start it again to continue"
            with suppress(OSError):  # the disk may be full; the error on the screen says so
                self.run.status("failed", reason=words)

    @property
    def measured(self) -> dict[str, float]:
        """The validation row of the selected step in the run's log, on rank 0."""
        return self.run.last_row("val/", until=self.selected.step)

    def ended(self, ending: Ending) -> bool:
        """Note where the training ended, and return whether the best state takes the place of the last one."""
        found, loop = ending.selection, self.config.loop
        best = loop.select == "best" and bool(found.best)
        self.selected = Selected(
            select="best" if best else "last",
            step=found.step if best else ending.step,
            trained=ending.step,
            steps=ending.steps,
            validations=found.seen,
            best=found.best,
            last=found.last,
        )
        self.evaluator.selected = self.selected
        if loop.compares:
            logger.info("the result is %s", self.selected)
        return best

    @property
    def engine(self) -> Engine:
        """The engine that trains the model, after `open_engine`."""
        assert self._engine is not None
        return self._engine

    def batches(self) -> tuple[int, int]:
        """Return the samples per process and micro-batch, and the micro-batches per step."""
        return derive_batches(self.config.loop.global_batch, self.world.size, self.config.engine.micro_batch)

    def open_engine(self, model: nn.Module) -> Engine:
        """Hand the model, already on the device, to an engine. The context closes it."""
        micro_batch, accumulation = self.batches()
        self._engine = Engine(
            model,
            self.world,
            optim=self.config.optim,
            config=self.config.engine,
            micro_batch=micro_batch,
            accumulation=accumulation,
        )
        return self._engine

    def model_config(self) -> FamilyConfig:
        """Return the config of the model that this stage trains. Its parents must have been loaded."""
        return self.spec.model_config(self.config, len(self.manifest.classes), self._parent_model)

    def flops(self, built: Mapping[str, nn.Module], image_size: tuple[int, int]) -> int:
        """Count the FLOPs of a step per sample of the first stream, by the workload of the stage's spec.

        Args:
            built: The student, and the frozen networks, by their names in the workload.
            image_size: (height, width) in pixels.
        """
        workload = self.spec.workload(self.config, len(self.manifest.classes), self._parent_model)
        return workload.flops(lambda network: forward_flops(built[network.name], image_size))

    def class_weights(self, config: ClassWeightsConfig | None) -> Tensor | None:
        """Return the weight of each class by its labels, (C,) on the device; None without a config."""
        if config is None:
            return None
        counts = torch.from_numpy(self.evaluator.class_counts())
        return class_weights(counts, config.kind, config.beta).to(self.world.device)

    def _parent_model(self, role: str) -> FamilyConfig:
        return self.ancestry.card(role).model

    def loaders(self, views: Mapping[str, View], guesses: np.ndarray | None = None) -> dict[str, Loader]:
        """Open the streams of the spec.

        All streams share the seed; their orders differ, because their samples do. A stream without labels is sampled
        uniformly, because balancing its classes would reveal them.

        Args:
            views: The transform of each stream's images. Streams that the stage does not have are ignored.
            guesses: What streams give in place of hidden labels; None = -1.
        """
        readers = self.config.virtual_readers(len(stream.sample_indices) for stream in self.streams.values())
        config = self.config.data.loader.model_copy(update={"virtual_readers": readers})
        return {
            name: Loader(
                self.manifest,
                stream.sample_indices,
                global_batch=stream.global_batch,
                rank=self.world.rank,
                world_size=self.world.size,
                seed=self.config.run.seed,
                views=views[name],
                config=config.model_copy(update={"sampling": "uniform"}) if stream.hide_labels else config,
                hide_labels=stream.hide_labels,
                guesses=guesses,
                quarantine=self.run.folder / "quarantine.jsonl",
                device=self.world.device,
            )
            for name, stream in self.streams.items()
        }

    def datasets(self) -> list[Manifest]:
        """Return the datasets that the run reads: for training, for validation, for the test."""
        data = self.config.data
        test = [] if data.test is None else [open_dataset(data.test, data.opening)]
        return [self.manifest, self.data.held_out.manifest, *test]

    def pictures(self, samples: Held, number: int, image_size: tuple[int, int]) -> Tensor:
        """Return the same images on every rank, spread over `samples`: (number, 3, H, W), on the device."""
        view = eval_views(
            image_size,
            mean=self.config.data.mean,
            std=self.config.data.std,
            view=self.config.data.view,
            decoding=self.config.data.decoding,
        )
        remote = self.config.data.loader.remote
        return spread(samples.manifest, samples.sample_indices, number, view, remote).images.to(self.world.device)

    def fingerprint_images(self, image_size: tuple[int, int]) -> Tensor:
        """Return the fingerprint batch, (4, 3, H, W) on the CPU: it proves a restored checkpoint and a loaded export."""
        known = next(subset for subset in (self.subsets.labelled, self.subsets.unlabelled) if len(subset))
        held_out = self.data.held_out
        samples = held_out if len(held_out.sample_indices) else Held(self.manifest, known)
        return self.pictures(samples, NUM_FINGERPRINT_IMAGES, image_size).cpu()
