"""The order in which torchvision's ImageFolder counts the images of a dataset."""

import json
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.datasets.manifest import Manifest
from pipeline.files import replace_text

NAMES_FILE = "convert.names.json"


def imagefolder_order(manifest: Manifest) -> NDArray[np.int64]:
    """Return the sample indices in ImageFolder's order: classes by name, then folders, then file names.

    Samples without a label have no place, unless no sample has a label. A key has _ for a dot of the file name, and
    `--resize` changes the ending; where this changes the order, the conversion has kept the names in `NAMES_FILE`.
    """
    path = manifest.folder / NAMES_FILE
    return _order(manifest, json.loads(path.read_bytes()) if path.is_file() else {})


def keep_names(manifest: Manifest, names: Sequence[str]) -> None:
    """Write `NAMES_FILE` if the order by the names of the files differs from the order by the members of the tars.

    Args:
        manifest: The dataset.
        names: (num_samples,) path of each image below the folder of the classes.
    """
    members = map(manifest.member, range(manifest.num_samples))
    kept = {member: name for name, member in zip(names, members, strict=True) if name != member}
    if (_order(manifest, kept) != _order(manifest, {})).any():
        replace_text(manifest.folder / NAMES_FILE, json.dumps(kept) + "\n")


def _order(manifest: Manifest, names: Mapping[str, str]) -> NDArray[np.int64]:
    labels = manifest.labels
    listed = np.flatnonzero(labels >= 0) if (labels >= 0).any() else np.arange(manifest.num_samples)
    classes = [*manifest.classes, ""]  # the last one is that of label -1

    def place(sample_index: int) -> tuple[str, str, str]:
        member = manifest.member(sample_index)
        folder, _, file = names.get(member, member).rpartition("/")
        return classes[labels[sample_index]], folder, file

    return np.array(sorted(listed.tolist(), key=place), np.int64)
