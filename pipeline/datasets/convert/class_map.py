"""A source under other classes: those of a list; or coarser ones by a table, such as ImageNet-127's."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.datasets.convert.classes import class_labels
from pipeline.datasets.convert.source import Problem, Source
from pipeline.datasets.text import read_text, shown
from pipeline.errors import DataError

_IMAGE = re.compile(r"(n\d{8})_\d+(?:\.JPE?G)?", re.IGNORECASE)


@dataclass
class Mapped(Source):
    """A source under other class names, a `Source`; keys, images and problems are those of `inner`."""

    inner: Source
    classes: Sequence[str]
    labels: Sequence[int]

    def __post_init__(self) -> None:
        self.name, self.keys, self.in_order = self.inner.name, self.inner.keys, self.inner.in_order
        self.names: Sequence[str] = self.inner.names
        self.files: Sequence[str] = self.inner.files
        self.problems: Mapping[int, Problem] = self.inner.problems
        self.left_out: Mapping[str, Sequence[str]] = self.inner.left_out

    def read(self, item: int) -> tuple[str, bytes]:
        """Return the file extension and the bytes of one image."""
        return self.inner.read(item)


def with_classes(source: Source, classes: Sequence[str]) -> Mapped:
    """Give a source the classes of a list; it may lack some.

    Raises:
        DataError: The source has a class that the list does not name.
    """
    known, label_of = class_labels(source.classes, classes, source.name)
    new = [label_of[name] for name in source.classes]
    return Mapped(source, known, [new[label] if label >= 0 else -1 for label in source.labels])


def read_class_map(path: Path) -> dict[str, str]:
    """Read a table of `CLASS COARSER-CLASS`, one pair a line, with a comma, a tab or spaces between.

    The coarser name is the rest of the line, so it may have spaces. Lines that begin with # are comments. An image of
    ImageNet (n01440764_10026.JPEG) counts as its class, as in ImageNet-127's list imgname2folder.txt.

    Raises:
        DataError: A line is no pair, or a class has two coarser ones.
    """
    found: dict[str, str] = {}
    for number, line in enumerate(read_text(path, "class map").splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        parts = re.split(r"\s*[,\t]\s*|\s+", line.strip(), maxsplit=1)
        if len(parts) != 2 or not all(parts):
            raise DataError(
                f"{path}, line {number}: {shown(line.strip()[:80])!r} is no pair of a class and its coarser class"
            )
        if image := _IMAGE.fullmatch(parts[0]):
            parts[0] = image.group(1)
        if found.setdefault(parts[0], parts[1]) != parts[1]:
            raise DataError(
                f"{path}, line {number}: {parts[0]!r} belongs to {found[parts[0]]!r} already; keep one of the lines"
            )
    if len(set(found.values())) < 2:
        raise DataError(f"{path} has {len(set(found.values()))} coarser classes; a dataset needs two or more")
    return found


def with_class_map(source: Source, path: Path) -> Mapped:
    """Give a source the coarser classes of a table: all of them, sorted by name.

    Args:
        source: The images.
        path: The table; it may name more classes than the source has.

    Raises:
        DataError: The table lacks a class of the source.
    """
    coarser = read_class_map(path)
    if missing := [name for name in source.classes if name not in coarser]:
        raise DataError(
            f"{path} has no line for {len(missing)} of the {len(source.classes)} classes of {source.name}, {missing[0]!r} first"
        )
    classes = tuple(sorted(set(coarser.values())))
    new = [classes.index(coarser[name]) for name in source.classes]
    return Mapped(source, classes, [new[label] if label >= 0 else -1 for label in source.labels])
