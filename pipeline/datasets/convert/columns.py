"""The labels of a column: class numbers or class names, some of which may be missing."""

from collections.abc import Sequence
from typing import Any

from pipeline.datasets.convert.classes import class_labels
from pipeline.errors import DataError


def column_labels(
    values: Sequence[Any], names: Sequence[str], classes: Sequence[str] | None, where: str
) -> tuple[list[str], list[int]]:
    """Return the classes of a column, and the label of each row.

    Args:
        values: What the rows hold: names, or numbers that count from 0. None, NaN, -1 and an empty name are no label.
        names: Class names that the file states, which numbers index; empty = it states none.
        classes: The classes to have; None = `names`, or else those seen.
        where: What the refusal calls the column.

    Raises:
        DataError: The values are no classes, or not those of `classes`.
    """
    raw = [_plain(value) for value in values]
    kinds = {type(value) for value in raw if value is not None}
    if not kinds and names and classes is None:
        return list(names), [-1] * len(raw)
    if kinds <= {str}:
        known, label_of = class_labels({value for value in raw if value}, classes, where)
        return known, [label_of[value] if value else -1 for value in raw]
    if kinds != {int} or min(value for value in raw if value is not None) < -1:
        raise DataError(f"{where} holds other values than class numbers or names; give --label-column")
    numbers = [-1 if value is None else value for value in raw]
    seen = sorted(set(numbers) - {-1})
    listed = list(names) or (list(classes) if classes is not None else [])
    if not listed and seen != list(range(len(seen))):
        gap = next(number for number, label in enumerate(seen) if number != label)
        row = numbers.index(seen[gap])
        raise DataError(
            f"{where}: row {row} has label {seen[gap]}, but no row has label {gap}; "
            "labels count from 0 without a gap; give all classes with --classes"
        )
    if listed and seen and seen[-1] >= len(listed):
        row = numbers.index(seen[-1])
        raise DataError(f"{where}: row {row} has label {seen[-1]}, but there are {len(listed)} classes")
    if names and classes is not None:  # the file's own names say which class each number is
        known, label_of = class_labels({names[label] for label in seen}, classes, where)
        return known, [label_of[names[label]] if label >= 0 else -1 for label in numbers]
    return listed or [str(label) for label in seen], numbers


def _plain(value: Any) -> Any:
    """Return a whole number for 1.0 and nothing for NaN, as pandas writes them where some are missing; a text for a bool."""
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, float) and (value != value or value.is_integer()):
        return None if value != value else int(value)
    return value
