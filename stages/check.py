"""What can be known before any process starts and without torch: the data is there, the parents fit, the numbers divide."""

import difflib
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from pipeline.datasets.manifest import Manifest, read_manifest
from pipeline.datasets.splits import Split, read_split
from pipeline.errors import ConfigError, HandoverError
from pipeline.exports.card import CARD, Card
from pipeline.exports.prefetch import missing_weights
from pipeline.models.config import TIMM_PREFIX, FamilyConfig, TimmConfig, VisionMambaConfig
from pipeline.train.run import refuse_other_config
from stages.configs import ArmConfig, DistillConfig, SemiConfig, StageConfig

STAGE_NUMBERS = {"arm": 1, "distill": 2, "semi": 3}


class Parts(NamedTuple):
    """SampleIndices in the training manifest."""

    labelled: np.ndarray
    unlabelled: np.ndarray
    validation: np.ndarray


def check(
    stage: str, config: StageConfig, world_size: int, pending: Mapping[Path, StageConfig] = MappingProxyType({})
) -> None:
    """Raises the error that the stage would end in, before it costs anything.

    `pending` maps the folders of exports that earlier stages of a chain will write to those stages' configs.
    """
    derive_batches(config.loop.global_batch, world_size, config.engine.micro_batch)
    refuse_other_config(config.run.folder(stage), config)
    manifest, _, parts = open_data(config)
    check_readers(config, streams(config, parts), world_size)
    if config.data.test is not None:
        test = read_manifest(config.data.test)
        if test.classes != manifest.classes:
            raise HandoverError(
                f"{config.data.test} and {config.data.train} name different classes; convert them with the same class list"
            )
    if isinstance(config, DistillConfig):
        _check_distill(config, len(manifest.classes))
    for role, folder in config.parents().items():
        if folder in pending:
            parent = pending[folder]
            if isinstance(parent, ArmConfig | DistillConfig):
                kind = "pretrainer" if isinstance(parent, ArmConfig) else "classifier"
                _check_form(config, role, folder, kind, parent.model)
            continue
        card = Card.read(folder, remedy=_remedy(config, folder))
        card.verify(folder)
        check_parent(config, role, folder, card, manifest, parts)


def check_readers(config: StageConfig, streams: Mapping[str, int], world_size: int) -> None:
    """Raise ConfigError unless `world_size` processes can share the streams (name -> samples) of a stage evenly."""
    given, batch, readers = (
        config.data.loader.virtual_readers,
        config.loop.global_batch,
        config.virtual_readers(streams.values()),
    )
    name, samples = min(streams.items(), key=lambda item: item[1])
    if not samples:
        raise ConfigError(
            f"there are no {name} samples in {config.data.split or config.data.train}; choose another split"
        )
    if samples < readers:
        raise ConfigError(
            f"data.loader.virtual_readers is {readers}, but there are only {samples} {name} samples to share among them;"
            " leave virtual_readers out"
        )
    if readers % world_size == 0:
        return
    if given:
        raise ConfigError(
            f"data.loader.virtual_readers {given} must be a multiple of the {world_size} processes;"
            " leave virtual_readers out, or change the number of processes"
        )
    fewer = max(n for n in range(1, world_size) if readers % n == 0)
    reason = (
        f"has only {samples} {name} samples" if samples < batch else "mixes images in pairs that stay in one process"
    )
    raise ConfigError(
        f"{world_size} processes cannot share the batches evenly: this stage has loop.global_batch {batch} and {reason};"
        f" start {fewer}, or change loop.global_batch"
    )


def _check_distill(config: DistillConfig, num_classes: int) -> None:
    if "num_classes" in config.model.model_fields_set and config.model.num_classes != num_classes:
        raise ConfigError(
            f"model.num_classes is {config.model.num_classes}, {config.data.train} has {num_classes} classes; leave it out"
        )
    foreign = [(f"{TIMM_PREFIX}{config.teacher.timm}", config.teacher.weights)] if config.teacher else []
    if config.weights:
        foreign.append((config.model.name, config.weights.path))
    for name, path in foreign:
        if path is None:
            continue
        if not path.is_file():
            raise missing_weights(path, name)
        without_labels = config.weights is not None and path == config.weights.path and not config.weights.saw_labels
        if config.data.split is not None and not config.allow_more_labels and not without_labels:
            raise HandoverError(
                f"{name} was trained on labels outside those of {config.data.split};"
                " set allow_more_labels=true to mark the result"
            )


def check_parent(config: StageConfig, role: str, folder: Path, card: Card, manifest: Manifest, parts: Parts) -> bool:
    """Whether an export may feed this stage in that role; returns whether it saw more labels than this stage claims."""
    card.check_preprocessing(config.data.preprocessing, folder)
    card.check_classes(manifest.classes, folder)
    _check_form(config, role, folder, card.kind, card.model)
    return card.check_labels(folder, manifest.hash, parts.labelled, allow_more=not config.claimed_labels())


def _check_form(config: StageConfig, role: str, folder: Path, kind: str, model: FamilyConfig) -> None:
    """Whether a parent of that kind and model, there already or still to come, fits."""
    if kind != "classifier" and (role == "teacher" or isinstance(config, SemiConfig)):
        raise HandoverError(
            f"{folder} holds a pretrainer; as {role} of this stage a classifier is needed: train it with stage distill"
        )
    if isinstance(config, SemiConfig) and config.ssmixup:
        _check_ssmixup(model, folder)
    if isinstance(config, DistillConfig):
        for name in _must_agree(role, kind, model, config):
            there, here = getattr(model, name, None), getattr(config.model, name, None)
            if there != here:
                raise HandoverError(
                    f"{folder} has model.{name} = {there!r}, this config {here!r};"
                    " make them alike, or start from another export"
                )


def _check_ssmixup(model: FamilyConfig, folder: Path) -> None:
    if not isinstance(model, VisionMambaConfig) or model.directions == 1:
        raise ConfigError(
            f"ssmixup blends the opposite directions of a Vision Mamba, and {getattr(model, 'name', 'the model')} of {folder}"
            " has none; leave ssmixup out (LyapEMA works with every model), or set mixup.pseudo=true to mix images instead"
        )


def _must_agree(role: str, kind: str, model: FamilyConfig, config: DistillConfig) -> tuple[str, ...]:
    """Fields of the model in which a parent and a student must not differ."""
    if role == "teacher":
        return ("image_size", "in_chans")  # it sees the student's images
    if type(model) is not type(config.model):
        return ("name",)
    if kind == "classifier":
        # Every timm name is a model of its own; the other families say what they are in their fields.
        free = set(model.free) - ({"name"} if isinstance(model, TimmConfig) else set())
        return tuple(name for name in type(model).model_fields if name not in free)
    return ("embed_dim", "depth", "d_state", "d_conv", "expand", "mlp", "norm", "patch_size", "in_chans")


def open_data(config: StageConfig) -> tuple[Manifest, Split | None, Parts]:
    """The training manifest, its split, and the parts: without a split every sample is labelled."""
    manifest = read_manifest(config.data.train)
    if config.data.split is None:
        nothing = np.empty(0, np.int64)
        return manifest, None, Parts(np.arange(manifest.num_samples), nothing, nothing)
    split = read_split(config.data.split, manifest)
    return manifest, split, Parts(*(split.subset(name) for name in Parts._fields))


def streams(config: StageConfig, parts: Parts) -> dict[str, int]:
    """How many samples each stream of a stage draws from, the first stream first."""
    labelled, unlabelled = len(parts.labelled), len(parts.unlabelled)
    if isinstance(config, ArmConfig):
        return {"training": labelled + unlabelled}
    unlabelled_too = isinstance(config, SemiConfig) and config.pseudo.weight > 0
    return {"labelled": labelled} | ({"unlabelled": unlabelled} if unlabelled_too else {})


def derive_batches(global_batch: int, world_size: int, micro_batch: int | None) -> tuple[int, int]:
    """(samples per process and micro-batch, micro-batches per step). The global batch is the config's; the rest follows."""
    if global_batch % world_size:
        raise ConfigError(
            f"loop.global_batch {global_batch} must be a multiple of the {world_size} processes; change either"
        )
    share = global_batch // world_size
    accumulation = -(-share // (micro_batch or share))
    if share % accumulation:
        raise ConfigError(
            f"each of {world_size} processes takes {share} samples a step, which engine.micro_batch {micro_batch} would cut into"
            f" {accumulation} unequal parts; choose a divisor of {share}"
        )
    return share // accumulation, accumulation


def is_complete(stage: str, config: StageConfig) -> bool:
    """Whether this very run has been finished, its export still sound; says so. Raises ConfigError for another run's folder."""
    folder = config.run.folder(stage)
    if not (folder / "export" / CARD).is_file():
        return False
    refuse_other_config(folder, config)
    try:
        Card.read(folder / "export").verify(folder / "export")
    except HandoverError as error:
        print(f"{error}: it is written again from the last checkpoint", file=sys.stderr, flush=True)
        return False
    print(f"{folder}: complete already, its export is reused", flush=True)
    return True


def _remedy(config: StageConfig, folder: Path) -> str:
    for stage, number in STAGE_NUMBERS.items():
        if folder == config.run.folder(stage) / "export":
            name = config.run.experiment
            file = Path(f"configs/{stage}/{name}.yaml")
            return f"make stage-{number} CONFIG={file if file.is_file() else file.with_stem('NAME')} ARGS=run.experiment={name}"
    meant = difflib.get_close_matches(folder.name, STAGE_NUMBERS, n=1)
    return f"init_from={meant[0]} names the export of that stage in the same experiment" if meant else ""
