"""Add labels that a person has given to a dataset: the same shards with another manifest, and a split that knows them."""

import csv
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pipeline.config import choose
from pipeline.datasets.joint import JointManifest
from pipeline.datasets.manifest import Manifest, ShardIndex, read_manifest, write_manifest
from pipeline.datasets.splits import CODES, Split, write_split
from pipeline.errors import ConfigError, DataError
from pipeline.files import read_regular, replacing

NEEDED = ("sample_index", "key", "label")


def read_answers(path: Path, manifest: Manifest) -> dict[int, int]:
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
    try:
        text = read_regular(path).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}); give the table that label-next wrote, filled in") from None
    rows = list(csv.DictReader(text.splitlines()))
    if rows and (missing := [name for name in NEEDED if name not in rows[0]]):
        raise DataError(f"{path} has no column {missing[0]}; give the table that label-next wrote, filled in")
    classes = {name: number for number, name in enumerate(manifest.classes)}
    found: dict[int, int] = {}
    for line, row in enumerate(rows, 2):
        given = (row["label"] or "").strip()
        if not given:
            continue
        try:
            index = int(row["sample_index"])
            fits = 0 <= index < manifest.num_samples and manifest.key(index) == row["key"]
        except ValueError:
            fits = False
        if not fits:
            raise DataError(
                f"{path}, line {line}: {manifest} has no image {row['key']!r} at {row['sample_index']!r}; give the table of"
                " this dataset, with both columns as they were written"
            )
        label = choose(f"class in {path}, line {line}", given, classes)
        if found.setdefault(index, label) != label:
            raise DataError(f"{path}, line {line}: image {row['key']!r} has two different labels; keep one of them")
    if not found:
        raise DataError(f"{path} has no label yet: write the name of a class into the column label of some rows")
    return found


def with_answers(
    manifest: Manifest, split: Split | None, answers: Mapping[int, int], out: Path
) -> tuple[Manifest, Split | None]:
    """Write a dataset with more labels, and its split in OUT/split.json.

    The shards are hard links where the file system allows it, else copies. Images of the answers become labelled; everything
    else of the split stays as it was, validation included.

    Args:
        manifest: The dataset.
        split: Its split; None = all images with a label are labelled.
        answers: Sample index -> class.
        out: Folder to write, whole or not at all.

    Raises:
        ConfigError: The dataset is several, or `out` exists.
    """
    if isinstance(manifest, JointManifest):
        raise ConfigError(
            f"{manifest} are several datasets, and answers are added to one at a time; name a run that read one"
        )
    if out.exists():
        raise ConfigError(f"{out} exists; give another folder for the dataset with the new labels")
    labels = manifest.labels.copy()
    labels[list(answers)] = list(answers.values())
    indices, first = [], 0
    for shard in manifest.shards:
        rows = np.arange(first, first + shard.count)
        table = manifest.rows(rows)
        members = [manifest.member(int(index)) for index in rows]
        offsets, lengths = table["offset"].tolist(), table["length"].tolist()
        indices.append(
            ShardIndex(shard=shard, members=members, offsets=offsets, lengths=lengths, labels=labels[rows].tolist())
        )
        first += shard.count
    with replacing(out) as temporary:
        temporary.mkdir(parents=True, exist_ok=True)
        for number, shard in enumerate(manifest.shards):
            if not manifest.url_of(number):
                _link(manifest.path_of(number), temporary / shard.name)
        write_manifest(temporary, manifest.classes, indices, manifest.location)
    written = read_manifest(out)
    if split is None:
        return written, None
    codes = split.codes.copy()
    codes[list(answers)] = CODES["labelled"]
    header = split.header | {
        "manifest": written.hash,
        "protocol": f"{split.protocol}; {len(answers)} images labelled later, chosen by label-next",
    }
    more = Split(header, codes, written.labels)
    write_split(more, out / "split.json")
    return written, more


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)
