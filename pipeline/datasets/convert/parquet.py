"""A folder of parquet files, or of a saved Hugging Face dataset, as a source; needs the optional pyarrow."""

import contextlib
import functools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.datasets.convert.columns import column_labels
from pipeline.datasets.convert.source import Problem, Source, UnreadableSource, stored_extension
from pipeline.datasets.formats import HEAD, format_of, is_hidden
from pipeline.errors import DataError, EnvironmentProblem, first_line
from pipeline.files import real_path


@dataclass
class Parquet(Source):
    """Images in parquet or arrow files, a `Source`; rows are read in order, since a row group is read as a whole.

    Attributes:
        column: Image column, of bytes or of structs with `bytes`, or with the `path` of a file.
        groups: File, row group and first item of every row group.
    """

    name: str
    classes: Sequence[str]
    keys: Sequence[str]
    labels: Sequence[int]
    column: str
    groups: Sequence[tuple[str, int, int]]
    problems: Mapping[int, Problem] = field(default_factory=dict)
    in_order: bool = True

    @property
    def files(self) -> Sequence[str]:  # type: ignore[override]
        """The parquet or arrow files."""
        return list(dict.fromkeys(path for path, _, _ in self.groups))

    def read(self, item: int) -> tuple[str, bytes]:
        """Return the file extension and the bytes of one image."""
        firsts = [first for _, _, first in self.groups]
        path, group, first = self.groups[int(np.searchsorted(firsts, item, side="right")) - 1]
        with _reading(path):
            value = _row_group(path, os.stat(path).st_mtime_ns, group, self.column)[item - first].as_py()
        where = f"{path}: row {item - first} of row group {group}"
        data = value.get("bytes") if isinstance(value, dict) else value
        if data is None and isinstance(value, dict) and isinstance(value.get("path"), str):
            data = _read_beside(Path(path), value["path"], where)
        if not isinstance(data, bytes):
            raise UnreadableSource(f"{where} has no image bytes in {self.column!r}")
        if not format_of(data[:HEAD]):
            raise UnreadableSource(f"{where} is no image in {self.column!r}")
        return stored_extension(where.replace(".", "_"), data), data


def parquet_folder(
    root: Path, image_column: str, label_column: str, classes: Sequence[str] | None = None, labelled: bool = True
) -> Parquet:
    """Take all parquet files below `root`, in order of name; or the arrow files that `save_to_disk` writes.

    Args:
        root: The folder, or one file.
        image_column: Name of the image column.
        label_column: Name of the column of class numbers or names; a null or -1 is an image without a label.
        classes: The classes to have; None = the names in the file's schema, or else the labels seen.
        labelled: Whether the label column is read at all.

    Raises:
        DataError: There are no such files, they lack such columns, or their labels are no classes.
        EnvironmentProblem: pyarrow is not installed.
    """
    _pyarrow()
    paths = [root] if root.is_file() else _files_below(root, ".parquet") or _files_below(root, ".arrow")
    if not paths:
        raise DataError(f"{root} has no .parquet and no .arrow files; give the folder that holds them")
    groups: list[tuple[str, int, int]] = []
    raw: list[Any] = []
    keys: list[str] = []
    names: list[str] = []
    for path in paths:
        table = _open(str(path))
        columns = [image_column, *([label_column] if labelled else [])]
        for column in columns:
            if column not in table.names:
                raise DataError(
                    f"{path} has no column {column!r}; it has {', '.join(table.names)}; choose one with --image-column, "
                    "--label-column (--label-column none = without labels)"
                )
        names = names or _label_names(table.metadata, label_column)
        stem = path.name if root == path else path.relative_to(root).as_posix()
        stem = stem.removesuffix(path.suffix).replace(".", "_")
        for group in range(table.num_groups):
            groups.append((str(path), group, len(raw)))
            with _reading(path):
                raw += table.read(group, label_column).to_pylist() if labelled else [None] * table.count(group)
        keys += [f"{stem}/{row:07d}" for row in range(len(raw) - len(keys))]
    known, labels = column_labels(raw, names, classes, f"column {label_column!r} of {root}")
    return Parquet(str(root), known, keys, labels, image_column, groups)


def _files_below(root: Path, ending: str) -> list[Path]:
    found = (path for path in root.rglob("*") if path.suffix.lower() == ending and path.is_file())
    return sorted(path for path in found if not any(map(is_hidden, path.relative_to(root).parts)))


def _label_names(metadata: Mapping[bytes, bytes] | None, column: str) -> list[str]:
    """Return the class names that the datasets library stores in the schema, if any."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return [str(name) for name in features[column]["names"]]
    except (KeyError, ValueError, TypeError):
        return []


def _read_beside(file: Path, path: str, where: str) -> bytes:
    """Return the bytes of an image that a row names; only files below the folder of the parquet file are read."""
    folder = real_path(file.parent)
    target = real_path(folder / path)
    if not target.is_relative_to(folder) or not target.is_file():
        raise UnreadableSource(f"{where} has no bytes, and its path {path!r} is no file below {folder}")
    try:
        return target.read_bytes()
    except OSError as error:
        raise UnreadableSource(f"{where}: {target} cannot be read ({error.strerror})") from None


class _ParquetFile:
    def __init__(self, path: str) -> None:
        import pyarrow.parquet

        self._file = pyarrow.parquet.ParquetFile(path)
        self.names: list[str] = self._file.schema_arrow.names
        self.metadata = self._file.schema_arrow.metadata
        self.num_groups: int = self._file.num_row_groups

    def read(self, group: int, column: str) -> Any:
        return self._file.read_row_group(group, [column]).column(0)

    def count(self, group: int) -> int:
        return int(self._file.metadata.row_group(group).num_rows)


class _ArrowFile:
    """A file of record batches; the whole file is one group. It is not mapped: a mapped file that is cut off kills."""

    num_groups = 1

    def __init__(self, path: str) -> None:
        import pyarrow as pa

        with pa.OSFile(path, "rb") as source:
            is_file = source.read(6) == b"ARROW1"
            source.seek(0)
            self._table = (pa.ipc.open_file if is_file else pa.ipc.open_stream)(source).read_all()
        self._table.validate(full=True)  # a place outside its buffers would be read
        self.names: list[str] = self._table.schema.names
        self.metadata = self._table.schema.metadata

    def read(self, group: int, column: str) -> Any:
        return self._table.column(column)

    def count(self, group: int) -> int:
        return int(self._table.num_rows)


def _open(path: str) -> _ParquetFile | _ArrowFile:
    with _reading(path):
        return _ArrowFile(path) if path.endswith(".arrow") else _ParquetFile(path)


@contextlib.contextmanager
def _reading(path: Path | str) -> Iterator[None]:
    """Turn what pyarrow raises for damaged files into a sentence; every part of a file may be damaged by itself."""
    pyarrow = _pyarrow()
    try:
        yield
    except (pyarrow.ArrowException, OSError, ValueError, LookupError, MemoryError, OverflowError) as error:
        raise DataError(f"{path} cannot be read ({first_line(error)}); restore or remove it") from None


@functools.lru_cache(maxsize=1)
def _row_group(path: str, time: int, group: int, column: str) -> Any:
    return _open(path).read(group, column)


def _pyarrow() -> Any:
    try:
        import pyarrow

        return pyarrow
    except ImportError:
        raise EnvironmentProblem("reading parquet needs pyarrow; pip install pyarrow==26.0.1") from None
