"""Datasets whose labels or shards a test chooses: copies of a dataset's tars with another manifest."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline.datasets.manifest import Manifest, ShardIndex, write_manifest


def relabelled(
    source: Manifest,
    folder: Path,
    labels: np.ndarray,
    classes: Sequence[str] | None = None,
    shards: slice = slice(None),
) -> Manifest:
    """Copy shards of a dataset and write a manifest that gives their samples other labels.

    Args:
        source: The dataset.
        folder: Folder to write.
        labels: A label for every sample of `source`.
        classes: Names of the classes; None = those of `source`.
        shards: Which shards to copy.
    """
    folder.mkdir(parents=True)
    indices, first = [], 0
    for shard in source.shards:
        rows = range(first, first + shard.count)
        table = source.rows(np.array(rows))
        indices.append(
            ShardIndex(
                shard=shard,
                members=[source.member(index) for index in rows],
                offsets=table["offset"].tolist(),
                lengths=table["length"].tolist(),
                labels=labels[rows.start : rows.stop].tolist(),
            )
        )
        first = rows.stop
    for index in indices[shards]:
        shutil.copy(source.folder / index.shard.name, folder)
    return write_manifest(folder, source.classes if classes is None else classes, indices[shards])
