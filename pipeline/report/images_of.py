"""Open the images that an experiment learnt from and was evaluated on, from what its folder says."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.datasets.config import Opening
from pipeline.datasets.joint import read_manifests, with_classes
from pipeline.datasets.manifest import Manifest
from pipeline.datasets.opening import open_dataset
from pipeline.datasets.splits import read_split
from pipeline.decoding import DEFAULT, Decoding
from pipeline.errors import DataError
from pipeline.report.results import Result

Indices = NDArray[np.int64]


class ImagesOf(NamedTuple):
    """The images of an experiment.

    Attributes:
        config: The `data` of the last stage's config.
        train: The training set.
        labelled: Sample indices of `train` that were learnt with their labels.
        unlabelled: Sample indices of `train` that were learnt without labels.
        validation: A manifest and sample indices for choosing among models; without indices if there are none.
        test: A manifest and sample indices that the evaluations are of.
        decoding: How images are decoded.
    """

    config: Mapping[str, Any]
    train: Manifest
    labelled: Indices
    unlabelled: Indices
    validation: tuple[Manifest, Indices]
    test: tuple[Manifest, Indices]
    decoding: Decoding


def images_of(result: Result) -> ImagesOf:
    """Open the images of an experiment.

    Args:
        result: The experiment.

    Raises:
        DataError: A dataset or the split cannot be opened, or no stage has a config.
    """
    configs = [run.config["data"] for run in result.stages.values() if run.config.get("data")]
    if not configs:
        raise DataError(f"{result.experiment} holds no config.yaml that names its data")
    config = configs[-1]
    listed = config["train"]
    folders = listed if isinstance(listed, list) else [listed]
    opening = Opening(
        Path(config["classes"]) if config.get("classes") else None, config.get("max_pixels", DEFAULT.max_pixels)
    )
    train = read_manifests([Path(folder) for folder in folders], opening)
    if config.get("split"):
        split = read_split(Path(config["split"]), train)
        labelled, unlabelled, own = (split.subset(name) for name in ("labelled", "unlabelled", "validation"))
    else:
        labelled, unlabelled = np.flatnonzero(train.labels >= 0), np.flatnonzero(train.labels < 0)
        own = labelled[:0]
    validation = (train, own)
    if config.get("validation"):
        validation = _labelled(Path(config["validation"]), train, opening)
    decoding = Decoding(ground=tuple(config.get("ground", DEFAULT.ground)), max_pixels=opening.max_pixels)
    if config.get("test"):
        test = _labelled(Path(config["test"]), train, opening)
        return ImagesOf(config, train, labelled, unlabelled, validation, test, decoding)
    # The evaluation was on the validation images, so nothing may be chosen on them.
    return ImagesOf(config, train, labelled, unlabelled, (train, own[:0]), validation, decoding)


def _labelled(folder: Path, train: Manifest, opening: Opening) -> tuple[Manifest, Indices]:
    manifest = with_classes(open_dataset(folder, opening), train.classes)
    return manifest, np.flatnonzero(manifest.labels >= 0)
