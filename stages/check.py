"""The checks before a stage starts: the data is there, the parents fit, the numbers divide. They need no process and no torch."""

import difflib
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np

from pipeline.config import find_config
from pipeline.datasets.manifest import Manifest, read_manifest
from pipeline.datasets.splits import Split, read_split
from pipeline.errors import ConfigError, HandoverError, PipelineError
from pipeline.exports.card import CARD, Card
from pipeline.models.config import FamilyConfig
from stages import SPECS, spec_of
from stages.configs.base import StageConfig
from stages.identity import refuse_other_run
from stages.spec import ParentModel, Stream, Subsets

Pending = Mapping[Path, StageConfig]  # folders of exports that earlier stages of a chain will write -> their configs
NONE_PENDING: Pending = MappingProxyType({})


def check(config: StageConfig, world_size: int, pending: Pending = NONE_PENDING) -> None:
    """Raise the error that the stage would end in, before it costs anything.

    Args:
        config: The stage's config.
        world_size: The number of processes.
        pending: The exports that earlier stages of the chain will write, with those stages' configs.

    Raises:
        PipelineError: The first problem found; its text begins with the name of the stage.
    """
    try:
        _check(config, world_size, pending)
    except PipelineError as error:
        raise type(error)(f"stage {config.stage}: {error}") from None


def _check(config: StageConfig, world_size: int, pending: Pending) -> None:
    spec = spec_of(config)
    derive_batches(config.loop.global_batch, world_size, config.engine.micro_batch)
    refuse_other_run(config)
    manifest, _, subsets = open_data(config)
    check_readers(config, spec.streams(config, subsets), world_size)
    if config.data.test is not None:
        test = read_manifest(config.data.test)
        if test.classes != manifest.classes:
            raise HandoverError(
                f"{config.data.test} and {config.data.train} name different classes; convert them with the same class list"
            )
    num_classes = len(manifest.classes)
    spec.check_data(config, num_classes)
    for role, folder in spec.parents(config).items():
        if folder in pending:
            kind = spec_of(pending[folder]).produces
            spec.check_parent(config, role, folder, kind, model_of(pending[folder], num_classes, pending))
            continue
        card = Card.read(folder, remedy=_remedy(config, folder))
        card.verify(folder)
        check_parent(config, role, folder, card, manifest, subsets)


def check_readers(config: StageConfig, streams: Mapping[str, Stream], world_size: int) -> None:
    """Refuse a number of processes that cannot share the streams of a stage evenly.

    Raises:
        ConfigError: Says how many processes can, or what to change.
    """
    samples = {name: len(stream.sample_indices) for name, stream in streams.items()}
    given, batch, readers = (
        config.data.loader.virtual_readers,
        config.loop.global_batch,
        config.virtual_readers(samples.values()),
    )
    name, fewest = min(samples.items(), key=lambda item: item[1])
    if not fewest:
        raise ConfigError(
            f"there are no {name} samples in {config.data.split or config.data.train}; choose another data.split"
        )
    if fewest < readers:
        raise ConfigError(
            f"data.loader.virtual_readers is {readers}, but there are only {fewest} {name} samples to share among them;"
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
    reason = f"has only {fewest} {name} samples" if fewest < batch else "mixes images in pairs that stay in one process"
    raise ConfigError(
        f"{world_size} processes cannot share the batches evenly: this stage has loop.global_batch {batch} and {reason};"
        f" start {fewer}, or change loop.global_batch"
    )


def check_parent(
    config: StageConfig, role: str, folder: Path, card: Card, manifest: Manifest, subsets: Subsets
) -> bool:
    """Refuse an export that may not feed this stage in that role.

    Returns:
        Whether the export saw more labels than this stage claims.

    Raises:
        PipelineError: Says what does not fit: preprocessing, classes, kind, form or labels.
    """
    if role != "teacher":  # a teacher's images are prepared as its card says
        card.check_preprocessing(config.data.preprocessing, folder)
    card.check_classes(manifest.classes, folder)
    spec_of(config).check_parent(config, role, folder, card.kind, card.model)
    return card.check_labels(folder, manifest.hash, subsets.labelled, allow_more=not config.claimed_labels())


def model_of(config: StageConfig, num_classes: int, pending: Pending = NONE_PENDING) -> FamilyConfig:
    """Return the config of the model that a stage trains, though its parents may not exist yet."""
    return spec_of(config).model_config(config, num_classes, parent_models(config, num_classes, pending))


def parent_models(config: StageConfig, num_classes: int, pending: Pending = NONE_PENDING) -> ParentModel:
    """Return a function from a parent's role to the config of its model: from its export, or from `pending`."""
    folders = spec_of(config).parents(config)

    def parent(role: str) -> FamilyConfig:
        folder = folders[role]
        if folder in pending:
            return model_of(pending[folder], num_classes, pending)
        return Card.read(folder).model

    return parent


def open_data(config: StageConfig) -> tuple[Manifest, Split | None, Subsets]:
    """Open the training manifest, its split and the subsets. Without a split every sample is labelled.

    Raises:
        DataError: The manifest or the split is missing or damaged, or they do not belong together.
    """
    manifest = read_manifest(config.data.train)
    if config.data.split is None:
        nothing = np.empty(0, np.int64)
        return manifest, None, Subsets(np.arange(manifest.num_samples), nothing, nothing)
    split = read_split(config.data.split, manifest)
    return manifest, split, Subsets(*(split.subset(name) for name in Subsets._fields))


def derive_batches(global_batch: int, world_size: int, micro_batch: int | None) -> tuple[int, int]:
    """Divide the global batch, which the config fixes, over processes and micro-batches.

    Args:
        global_batch: Samples of the first stream in an optimizer step, over all processes.
        world_size: The number of processes.
        micro_batch: The most samples that a process takes at once, or None for its whole share.

    Returns:
        Samples per process and micro-batch, and micro-batches per step.

    Raises:
        ConfigError: The numbers do not divide.
    """
    if global_batch % world_size:
        raise ConfigError(
            f"loop.global_batch {global_batch} must be a multiple of the {world_size} processes; change either"
        )
    share = global_batch // world_size
    accumulation = -(-share // (micro_batch or share))
    if share % accumulation:
        raise ConfigError(
            f"each of {world_size} processes takes {share} samples a step, which engine.micro_batch {micro_batch} would cut"
            f" into {accumulation} unequal micro-batches; set engine.micro_batch to a divisor of {share}"
        )
    return share // accumulation, accumulation


def is_complete(config: StageConfig) -> bool:
    """Find out whether this very run has finished and its export is sound, and say so.

    Raises:
        PipelineError: The folder belongs to another run (see `refuse_other_run`).
    """
    folder = config.folder
    if not (folder / "export" / CARD).is_file():
        return False
    refuse_other_run(config)
    try:
        Card.read(folder / "export").verify(folder / "export")
    except HandoverError as error:
        print(f"{error}: it is written again from the last checkpoint", file=sys.stderr, flush=True)
        return False
    print(f"{folder}: complete already, its export is reused", flush=True)
    return True


def _remedy(config: StageConfig, folder: Path) -> str:
    """What to type to get the export that is missing in `folder`."""
    for stage, spec in SPECS.items():
        if folder == config.run.folder(stage) / "export":
            name = config.run.experiment
            file = Path(f"configs/{stage}/{name}.yaml")
            file = file if find_config(file).is_file() else file.with_stem("NAME")
            return f"make stage-{spec.number} CONFIG={file} ARGS=run.experiment={name}"
    meant = difflib.get_close_matches(folder.name, SPECS, n=1)
    return f"init_from={meant[0]} names the export of that stage in the same experiment" if meant else ""
