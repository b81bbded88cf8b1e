"""Add labels that a person has given to a dataset: the same images with more labels, and a split that knows them."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.config import choose
from pipeline.datasets.convert.rows import read_table
from pipeline.datasets.joint import JointManifest
from pipeline.datasets.manifest import Manifest, read_image, read_manifest, write_manifest
from pipeline.datasets.splits import CODES, Split, write_split
from pipeline.datasets.tars import scan_shard
from pipeline.datasets.text import same_form
from pipeline.errors import ConfigError, DataError
from pipeline.files import replacing

NEEDED = ("sample_index", "key", "label")


def read_labels(path: Path, manifest: Manifest) -> dict[int, int]:
    """Read the labels that a person has filled into a table of `label-next`.

    Args:
        path: CSV with the columns sample_index, key and label; a row without a label is left out.
        manifest: The dataset that the table is of.

    Returns:
        Sample index -> class.

    Raises:
        DataError: The table cannot be read, lacks a column, or is of another dataset.
        ConfigError: A label is no class of the dataset.
    """
    if not path.exists():
        raise DataError(f"{path} does not exist; give the table that label-next wrote, filled in")
    rows, titles = read_table(path, NEEDED)
    if rows is None and titles:
        missing = next(name for name in NEEDED if name not in titles)
        raise DataError(f"{path} has no column {missing}; give the table that label-next wrote, filled in")
    classes = {same_form(name): number for number, name in enumerate(manifest.classes)}
    found: dict[int, int] = {}
    for line, row in enumerate(rows or (), 2):
        index_given, key, given = (str(row.get(name, "")).strip() for name in NEEDED)
        given = same_form(given)
        if not given:
            continue
        try:
            index = int(index_given)
            fits = 0 <= index < manifest.num_samples and manifest.key(index).strip() == key
        except ValueError:
            fits = False
        if not fits:
            raise DataError(
                f"{path}, line {line}: {manifest} has no image {key!r} at {index_given!r}; give the table of"
                " this dataset, with both columns as they were written"
            )
        label = choose(f"class in {path}, line {line}", given, classes)
        if found.setdefault(index, label) != label:
            raise DataError(f"{path}, line {line}: image {key!r} has two different labels; keep one of them")
    if not found:
        raise DataError(f"{path} has no label yet: write the name of a class into the column label of some rows")
    return found


def with_labels(
    manifest: Manifest, split: Split | None, added: Mapping[int, int], out: Path
) -> tuple[Manifest, Split | None]:
    """Write a dataset with more labels, and its split in OUT/split.json.

    The shards are written anew, with the images byte for byte and in the same order. Images with a new label become
    labelled; everything else of the split stays as it was, validation included.

    Args:
        manifest: The dataset.
        split: Its split; None = all images with a label are labelled.
        added: Sample index -> class.
        out: Folder to write, whole or not at all.

    Raises:
        ConfigError: The dataset is several, or `out` exists.
        DataError: The shards are remote.
    """
    if isinstance(manifest, JointManifest):
        raise ConfigError(
            f"{manifest} are several datasets, and labels are added to one at a time; name a run that read one"
        )
    if out.exists():
        raise ConfigError(f"{out} exists; give another folder for the dataset with the new labels")
    labels = manifest.labels.copy()
    labels[list(added)] = list(added.values())
    with replacing(out) as temporary:
        temporary.mkdir(parents=True, exist_ok=True)
        indices, first = [], 0
        for number, shard in enumerate(manifest.shards):
            path = temporary / f"{number:06d}.tar"
            _write_shard(path, manifest, range(first, first + shard.count), labels)
            indices.append(scan_shard(path, len(manifest.classes)))
            first += shard.count
        write_manifest(temporary, manifest.classes, indices)
    written = read_manifest(out)
    if split is None:
        return written, None
    codes = split.codes.copy()
    codes[list(added)] = CODES["labelled"]
    header = split.header | {
        "manifest": written.hash,
        "protocol": f"{split.protocol}; {len(added)} images labelled later, chosen by label-next",
    }
    more = Split(header, codes, written.labels)
    write_split(more, out / "split.json")
    return written, more


def _write_shard(path: Path, manifest: Manifest, sample_indices: Iterable[int], labels: NDArray[np.int64]) -> None:
    """Write a tar in the form of `convert`, since `verify` compares the labels of the tars with the manifest's."""
    from webdataset import TarWriter

    with path.open("wb") as file, TarWriter(file, encoder=False, mtime=0) as writer:
        for k in sample_indices:
            ending = manifest.member(k).rpartition(".")[2]
            sample: dict[str, str | bytes] = {"__key__": manifest.key(k), ending: read_image(manifest, k)}
            if labels[k] >= 0:
                sample["cls"] = str(labels[k]).encode()
            writer.write(sample)
