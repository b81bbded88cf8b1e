"""What a stage is (torch-free): its streams, parents, paths, model and workload.

Each stage has one `StageSpec` in `stages/configs/NAME.py`; `stages.SPECS` is the only table of them. The checks before a
start, the plan, the doctor, the preflight and the run itself ask the spec, so that none of them asks which stage it has.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, NamedTuple, TypeVar

import numpy as np

from pipeline.datasets.manifest import Manifest
from pipeline.datasets.splits import Split
from pipeline.errors import HandoverError
from pipeline.models.backbone.config import WHOLE, BackboneConfig
from pipeline.models.config import DecoderConfig
from pipeline.models.family import FamilyConfig

if TYPE_CHECKING:
    from stages.configs.base import StageConfig

C = TypeVar("C", bound="StageConfig")

ParentModel = Callable[[str], FamilyConfig]  # the role of a parent -> the config of its model


class Subsets(NamedTuple):
    """The subsets of a training manifest that a split defines, each an array of sample indices."""

    labelled: np.ndarray
    unlabelled: np.ndarray
    validation: np.ndarray


class Held(NamedTuple):
    """Samples with labels that no stage trains on: the validation set.

    Attributes:
        manifest: Their dataset, with its labels counted in the classes of the training data.
        sample_indices: The samples; empty without a validation set.
    """

    manifest: Manifest
    sample_indices: np.ndarray


@dataclass(frozen=True)
class StageData:
    """The images of a stage.

    Attributes:
        manifest: The training data, one dataset or several as one.
        split: Its split, or None.
        subsets: Its subsets.
        held_out: The validation set: the split's subset, or a dataset of its own.
    """

    manifest: Manifest
    split: Split | None
    subsets: Subsets
    held_out: Held

    def labels(self) -> dict[str, int]:
        """Count what is known: the labels that are learnt and held out, and the unlabelled images with and without one."""
        hidden = int((self.manifest.labels[self.subsets.unlabelled] >= 0).sum())
        return {
            "labelled": len(self.subsets.labelled),
            "validation": len(self.held_out.sample_indices),
            "hidden": hidden,
            "without_label": len(self.subsets.unlabelled) - hidden,
        }


def in_words(labels: Mapping[str, int]) -> str:
    """Say in one line where the labels are; the argument is that of `StageData.labels`."""
    return (
        f"labels: {labels['labelled']} for training, {labels['validation']} spent on validation, {labels['hidden']} hidden;"
        f" {labels['without_label']} unlabelled images have none"
    )


@dataclass(frozen=True)
class Stream:
    """Samples that a stage trains on, drawn without end.

    Attributes:
        sample_indices: The rows of the manifest that it draws from.
        global_batch: Samples of this stream in one optimizer step, over all processes.
        hide_labels: Whether the loader hands out -1 in place of every label.
    """

    sample_indices: np.ndarray
    global_batch: int
    hide_labels: bool = False


@dataclass(frozen=True)
class Network:
    """One network of an optimizer step.

    `weights` says what is kept in memory, in a checkpoint and on the wire:

    - trained: weights, gradients, masters and moments; ZeRO shards them.
    - averaged: an average of the trained weights, sharded like a moment, and a whole copy for inference.
    - frozen: a whole copy on every rank; it is neither saved nor sent.

    Attributes:
        name: `student`, or the name of the companion in checkpoints (`teacher`, `average`).
        weights: See above.
        model: The config to build it from.
        decoder: The decoder of ARM pretraining, or None.
        backbone: Which part of it trains.
        trained_images: Images that pass forward and backward, per sample of the stage's first stream.
        inferred_images: Images that pass forward only, per sample of the stage's first stream.
    """

    name: str
    weights: Literal["trained", "averaged", "frozen"]
    model: FamilyConfig
    decoder: DecoderConfig | None = None
    backbone: BackboneConfig = WHOLE
    trained_images: int = 0
    inferred_images: int = 0


@dataclass(frozen=True)
class Workload:
    """All networks of an optimizer step; the first is the student. FLOPs, memory, disk and traffic follow from them."""

    networks: tuple[Network, ...]

    @property
    def student(self) -> Network:
        """The network that is trained."""
        return self.networks[0]

    @property
    def averages(self) -> tuple[str, ...]:
        """Names of the averages of the student's weights."""
        return tuple(network.name for network in self.networks if network.weights == "averaged")

    @property
    def frozen(self) -> tuple[Network, ...]:
        """The frozen networks."""
        return tuple(network for network in self.networks if network.weights == "frozen")

    @property
    def images(self) -> int:
        """Images of all streams per sample of the first stream."""
        return self.student.trained_images

    def flops(self, forward: Callable[[Network], int]) -> int:
        """Count the FLOPs of an optimizer step per sample of the first stream, backward passes included.

        Args:
            forward: Counts the FLOPs of one image's forward pass through a network.
        """
        if self.student.backbone.cached_views:
            return 1  # the classifier's work is not counted, but plans divide by the work of a step
        total, own = 0, forward(self.student)
        for network in self.networks:
            passes = network.backbone.passes * network.trained_images + network.inferred_images
            # An average has the student's architecture.
            total += passes * (forward(network) if network.weights == "frozen" else own)
        return total


class StageSpec(ABC, Generic[C]):
    """What one stage is. A subclass states the facts that differ; `stages.SPECS` holds one instance per stage.

    Attributes:
        config: The schema of its config files.
        module: The module with `prepare(s) -> Prepared` (`stages/drivers.py`). It loads torch, so it is imported only to run.
        produces: The kind of its export.
        number: Its place in the chain, from 1.
        names: The names of all stages, in order. A parent may be given as one of them.
    """

    config: ClassVar[type["StageConfig"]]
    module: ClassVar[str]
    produces: ClassVar[Literal["pretrainer", "classifier"]]

    def __init__(self, number: int, names: tuple[str, ...]) -> None:
        self.number, self.names = number, names

    @property
    def name(self) -> str:
        """The stage's name, as in `python -m stages NAME` and in the run's folder."""
        return self.config.stage

    @property
    def is_last(self) -> bool:
        """Whether the chain ends with this stage."""
        return self.name == self.names[-1]

    @abstractmethod
    def streams(self, config: C, subsets: Subsets) -> dict[str, Stream]:
        """Name the streams that the stage draws its batches from, the first stream first."""

    @abstractmethod
    def model_config(self, config: C, num_classes: int, parent: ParentModel) -> FamilyConfig:
        """Return the config of the model that the stage trains.

        Args:
            config: The stage's config.
            num_classes: Classes of the training manifest.
            parent: Gives the model of a parent by its role; called only where the result depends on it.
        """

    def minimises(self, config: C) -> bool:
        """Whether the number by which its validations are compared (`loop.select`) is a loss."""
        return False

    @abstractmethod
    def workload(self, config: C, num_classes: int, parent: ParentModel) -> Workload:
        """List the networks of one optimizer step. The arguments are those of `model_config`."""

    def references(self, config: C) -> dict[str, str]:
        """Map the key of each parent to its value: the name of a stage, STAGE/export-NAME, or an export's folder."""
        return {}

    def foreign_files(self, config: C) -> dict[str, Path]:
        """Map keys to files of weights from outside. Nothing is downloaded, so they must be there."""
        return {}

    def other_paths(self, config: C) -> dict[str, Path]:
        """Map keys to further paths that a rank reads or writes and every node must see."""
        return {}

    def parents(self, config: C) -> dict[str, Path]:
        """Map roles to the folders of the exports that the stage consumes.

        A role is the key without its last word, if it has two: `teacher.export` gives `teacher`.
        """
        return {key.partition(".")[0]: self._export(config, ref) for key, ref in self.references(config).items()}

    def _export(self, config: C, reference: str) -> Path:
        stage, _, name = reference.partition("/")
        if stage in self.names and (not name or re.fullmatch(r"export(-[a-z]+)?", name)):
            return config.run.folder(stage) / (name or "export")
        return Path(reference)

    def exports(self, config: C) -> tuple[str, ...]:
        """Name the folders of the exports that the stage writes into its run; the first is the stage's result."""
        return ("export",)

    def paths(self, config: C) -> dict[str, Path]:
        """Map keys to every path that a rank reads or writes.

        `data.loader.remote.cache` is not among them: it belongs on a disk of each node.
        """
        folders = config.data.train_folders
        names = ["data.train"] if len(folders) == 1 else [f"data.train[{number}]" for number in range(len(folders))]
        data: dict[str, Path | None] = dict(zip(names, folders, strict=True))
        data |= {f"data.{key}": getattr(config.data, key) for key in ("split", "validation", "test")}
        parents = zip(self.references(config), self.parents(config).values(), strict=True)
        return {
            "run.root": config.run.root,
            **{key: path for key, path in data.items() if path is not None},
            **dict(parents),
            **self.foreign_files(config),
            **self.other_paths(config),
        }

    def check_data(self, config: C, num_classes: int) -> None:
        """Refuse what does not fit a training manifest of `num_classes` classes, and files that are not there.

        Raises:
            PipelineError: Says what does not fit.
        """

    def check_parent(self, config: C, role: str, folder: Path, kind: str, model: FamilyConfig) -> None:
        """Refuse a parent of the wrong kind or form, whether its export exists or is still to be written.

        Args:
            config: The stage's config.
            role: The parent's role, as in `parents`.
            folder: The parent's export, for the error message.
            kind: `pretrainer` or `classifier`.
            model: The config of the parent's model.

        Raises:
            PipelineError: Says what does not fit.
        """

    def need_classifier(self, role: str, folder: Path, kind: str) -> None:
        """Refuse a pretrainer where a classifier is needed.

        Raises:
            HandoverError: `kind` is not `classifier`.
        """
        if kind != "classifier":
            raise HandoverError(
                f"{folder} holds a pretrainer, but stage {self.name} needs a classifier as its {role}; train one with"
                " stage distill and name its export"
            )


def table(*kinds: type[StageSpec[Any]]) -> dict[str, StageSpec[Any]]:
    """Make the table of the stages, in the order in which they feed one another."""
    names = tuple(kind.config.stage for kind in kinds)
    return {name: kind(number, names) for number, (name, kind) in enumerate(zip(names, kinds, strict=True), start=1)}
