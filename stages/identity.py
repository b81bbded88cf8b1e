"""Whether a run folder belongs to the very run that a config describes (torch-free).

Values decide by the schema (`pipeline.identity`), inputs by their hash: where a dataset or a parent lies may change.
"""

import functools
from collections.abc import Callable
from pathlib import Path

from pipeline.datasets.joint import read_manifests
from pipeline.datasets.manifest import Manifest
from pipeline.datasets.opening import open_dataset
from pipeline.datasets.splits import read_split
from pipeline.errors import PipelineError
from pipeline.exports.card import Card
from pipeline.files import sha256_of
from pipeline.train.run import has_begun, refuse_other_config, refuse_other_inputs, saved_inputs
from stages import spec_of
from stages.configs.base import StageConfig


def refuse_other_run(config: StageConfig) -> dict[str, str | None]:
    """Refuse a run folder that another run has begun: one name is one run.

    Returns:
        The hash of every input, as `inputs_of` gives it; nothing where no run has begun.

    Raises:
        ConfigError: If the folder's config has other values.
        DataError: If its run trains on another dataset or split.
        HandoverError: If its run has other parents.
    """
    folder = config.folder
    if not has_begun(folder):
        return {}
    refuse_other_config(folder, config)
    inputs = inputs_of(config)
    refuse_other_inputs(folder, saved_inputs(folder), inputs)
    return inputs


def inputs_of(config: StageConfig, manifest: Manifest | None = None) -> dict[str, str | None]:
    """Return the hash of every input of a run, by the config key that names it.

    An input that cannot be read has None: whether it must be there is for `stages.check` to say.

    Args:
        config: The stage's config.
        manifest: The training manifest, if it is open already.
    """
    data, spec = config.data, spec_of(config)
    train = (
        functools.cache(lambda: read_manifests(data.train_folders, data.opening))
        if manifest is None
        else lambda: manifest
    )
    readers: list[tuple[str, Path | None, Callable[[Path], str]]] = [
        ("data.train", data.train_folders[0], lambda _: train().hash),
        ("data.split", data.split, lambda path: read_split(path, train()).hash),
        ("data.validation", data.validation, lambda folder: open_dataset(folder, data.opening).hash),
        ("data.test", data.test, lambda folder: open_dataset(folder, data.opening).hash),
    ]
    folders = zip(spec.references(config), spec.parents(config).values(), strict=True)
    readers += [(key, folder, lambda folder: Card.read(folder).weights_sha256) for key, folder in folders]
    readers += [(key, path, sha256_of) for key, path in spec.foreign_files(config).items()]
    return {key: _hash(read, path) for key, path, read in readers if path is not None}


def _hash(read: Callable[[Path], str], path: Path) -> str | None:
    try:
        return read(path)
    except (PipelineError, OSError):
        return None
