"""The checks before a stage starts: the data is there, the parents fit, the numbers divide. They need no process and no torch."""

import difflib
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np

from pipeline.config import find_config
from pipeline.datasets.config import Opening
from pipeline.datasets.joint import read_manifests, with_classes
from pipeline.datasets.manifest import Manifest
from pipeline.datasets.opening import open_dataset
from pipeline.datasets.splits import read_split
from pipeline.errors import ConfigError, DataError, HandoverError, PipelineError
from pipeline.exports.card import CARD, Card
from pipeline.models.family import FamilyConfig
from pipeline.report.tracker import check_installed
from stages import SPECS, spec_of
from stages.configs.base import StageConfig
from stages.identity import refuse_other_run
from stages.spec import Held, ParentModel, StageData, Stream, Subsets

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
    check_installed(config.run.tracker)
    refuse_other_run(config)
    data = open_data(config)
    manifest, subsets = data.manifest, data.subsets
    check_readers(config, spec.streams(config, subsets), world_size)
    if config.data.test is not None:
        open_labelled("data.test", config.data.test, manifest, config.data.opening)
    if config.loop.compares and not len(data.held_out.sample_indices):
        key = "select=best" if config.loop.select == "best" else "patience"
        raise ConfigError(
            f"loop.{key} compares validations, but there are no validation images; set loop.select=last and"
            " loop.patience=null, or hold some out with `python -m pipeline.data split --validation-per-class`, or give"
            " data.validation"
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
    model_of(config, num_classes, pending)  # refuses parents that do not fit one another


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
        where = config.data.split or config.data.train_names
        remedy = "choose another data.split" if config.data.split else "add a dataset that has some to data.train"
        if name == "unlabelled" and not config.data.split:
            remedy += ", or hide labels with `python -m pipeline.data split` and give data.split"
        raise ConfigError(f"there are no {name} samples in {where}; {remedy}")
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
    return card.check_labels(folder, manifest.first_index, subsets.labelled, allow_more=not config.claimed_labels())


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


def written_by(config: StageConfig) -> dict[Path, StageConfig]:
    """Return the folders of the exports that a stage will write, as `Pending` has them."""
    return {config.folder / name: config for name in spec_of(config).exports(config)}


def open_data(config: StageConfig) -> StageData:
    """Open the training data, its split, the subsets and the validation set.

    Without a split every sample that has a label is labelled, and the others are unlabelled.

    Raises:
        ConfigError: There are two validation sets.
        DataError: A manifest or the split is missing or damaged, or they do not belong together.
    """
    data = config.data
    manifest = read_manifests(data.train_folders, data.opening)
    if data.split is None:
        split, known = None, manifest.labels >= 0
        subsets = Subsets(np.flatnonzero(known), np.flatnonzero(~known), np.empty(0, np.int64))
    else:
        split = read_split(data.split, manifest)
        subsets = Subsets(*(split.subset(name) for name in Subsets._fields))
    if data.validation is None:
        return StageData(manifest, split, subsets, Held(manifest, subsets.validation))
    if len(subsets.validation):
        raise ConfigError(
            f"data.validation is {data.validation}, but data.split {data.split} holds out {len(subsets.validation)} samples"
            " too; set data.validation=null, or make a split with --validation-per-class 0"
        )
    held_out = open_labelled("data.validation", data.validation, manifest, data.opening)
    if held_out.manifest.hash in manifest.first_index:
        raise ConfigError(
            f"data.validation = {data.validation} is among the training data; give another dataset, or hold samples out with"
            " `python -m pipeline.data split --validation-per-class`"
        )
    return StageData(manifest, split, subsets, held_out)


def open_labelled(key: str, folder: Path, train: Manifest, opening: Opening) -> Held:
    """Open a dataset that is only evaluated: its samples with a label, counted in the classes of the training data.

    Args:
        key: The config key that names it.
        folder: Its folder.
        train: The training manifest.
        opening: How it is opened if it has no shards.

    Raises:
        DataError: It cannot be opened, or no sample has a label.
        HandoverError: It has a class that the training data does not have.
    """
    found = open_dataset(folder, opening)
    try:
        manifest = with_classes(found, train.classes)
    except DataError as error:
        raise HandoverError(f"{key} = {error}") from None
    known = np.flatnonzero(manifest.labels >= 0)
    if not len(known):
        raise DataError(
            f"{key} = {folder} has no sample with a label, so nothing can be evaluated on it; set {key}=null"
        )
    return Held(manifest, known)


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
    inputs = refuse_other_run(config)
    try:
        Card.read(folder / "export").verify(folder / "export")
    except HandoverError as error:
        print(f"{error}: it is written again from the last checkpoint", file=sys.stderr, flush=True)
        return False
    print(f"{folder}: complete already, its export is reused", flush=True)
    for key in (key for key, found in inputs.items() if found is None):
        print(f"note: {key} cannot be read, so it was not compared with that of the run", file=sys.stderr, flush=True)
    return True


def _remedy(config: StageConfig, folder: Path) -> str:
    """What to type to get the export that is missing in `folder`."""
    for stage, spec in SPECS.items():
        if folder.parent == config.run.folder(stage):
            name = config.run.experiment
            if folder.name != "export" and (folder.parent / "export").is_dir():
                return f"train stage {stage} again under another run.experiment: this run has written no {folder.name}"
            file = Path(f"configs/{stage}/{name}.yaml")
            file = file if find_config(file).is_file() else file.with_stem("NAME")
            return f"make stage-{spec.number} CONFIG={file} ARGS=run.experiment={name}"
    meant = difflib.get_close_matches(folder.name, SPECS, n=1)
    return f"init_from={meant[0]} names the export of that stage in the same experiment" if meant else ""
