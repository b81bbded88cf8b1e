"""A folder of parquet files, as Hugging Face lays it out, as a source; needs the optional pyarrow."""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import DataError, EnvironmentProblem
from pipeline.images import UnreadableImage, read_header


@dataclass
class Parquet:
    """Images in parquet files, a `Source`; rows are read in order, since a row group is read as a whole.

    Attributes:
        column: Image column, of bytes or of structs with `bytes`.
        groups: File, row group and first item of every row group.
    """

    name: str
    classes: Sequence[str]
    keys: Sequence[str]
    labels: Sequence[int]
    column: str
    groups: Sequence[tuple[str, int, int]]
    in_order: bool = True

    def read(self, item: int) -> tuple[str, bytes]:
        """Return the file extension and the bytes of one image."""
        firsts = [first for _, _, first in self.groups]
        path, group, first = self.groups[int(np.searchsorted(firsts, item, side="right")) - 1]
        value = _row_group(path, group, self.column)[item - first].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise DataError(f"{path}: row {item - first} of row group {group} has no image bytes in {self.column!r}")
        try:
            return read_header(data).format.lower().replace("jpeg", "jpg"), data
        except UnreadableImage as error:
            raise DataError(f"{path}: row {item - first} of row group {group} is no image ({error})") from None


def parquet_folder(root: Path, image_column: str, label_column: str) -> Parquet:
    """Take all parquet files below `root`, in order of name.

    Args:
        root: The folder.
        image_column: Name of the image column.
        label_column: Name of the column of class numbers.

    Raises:
        DataError: There are no parquet files, or they lack such columns.
        EnvironmentProblem: pyarrow is not installed.
    """
    pq = _pyarrow_parquet()
    paths = sorted(root.rglob("*.parquet"))
    if not paths:
        raise DataError(f"{root} has no .parquet files; give the folder that holds them")
    groups: list[tuple[str, int, int]] = []
    labels: list[int] = []
    keys: list[str] = []
    classes: list[str] = []
    for path in paths:
        file = pq.ParquetFile(path)
        known = file.schema_arrow.names
        for column in (image_column, label_column):
            if column not in known:
                raise DataError(
                    f"{path} has no column {column!r}; it has {', '.join(known)}; choose one with --image-column, --label-column"
                )
        classes = classes or _label_names(file.schema_arrow.metadata, label_column)
        stem = path.relative_to(root).with_suffix("").as_posix().replace(".", "_")
        for group in range(file.num_row_groups):
            groups.append((str(path), group, len(labels)))
            labels += file.read_row_group(group, [label_column]).column(0).to_pylist()
        keys += [f"{stem}/{row:07d}" for row in range(len(labels) - len(keys))]
    if any(not isinstance(label, int) or label < -1 for label in labels):
        raise DataError(f"{root}: column {label_column!r} holds other values than class numbers; give --label-column")
    classes = classes or [str(c) for c in range(max(labels) + 1)]
    return Parquet(str(root), classes, keys, labels, image_column, groups)


def _label_names(metadata: dict[bytes, bytes] | None, column: str) -> list[str]:
    """Return the class names that the datasets library stores in the schema, if any."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return [str(name) for name in features[column]["names"]]
    except (KeyError, ValueError, TypeError):
        return []


@functools.lru_cache(maxsize=1)
def _row_group(path: str, group: int, column: str) -> Any:
    return _pyarrow_parquet().ParquetFile(path).read_row_group(group, [column]).column(0)


def _pyarrow_parquet() -> Any:
    try:
        import pyarrow.parquet

        return pyarrow.parquet
    except ImportError:
        raise EnvironmentProblem("reading parquet needs pyarrow; pip install pyarrow==26.0.1") from None
