"""Files of a run with one JSON object, or with one a line such as metrics.jsonl: the one place that reads them."""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

_MAX_DIGITS = 19  # Every 64-bit integer has at most so many.


def read_object(path: Path) -> dict[str, Any]:
    """Return the object of a JSON file; empty if there is no file, and with a warning if it is damaged."""
    if not path.is_file():
        return {}
    try:
        values = parse(path.read_bytes())
    except ValueError:
        values = None
    if isinstance(values, dict):
        return values
    logger.warning("%s is damaged and is left out", path)
    return {}


def parse(text: bytes) -> Any:
    """Parse JSON that a program may use without a second look.

    Raises:
        ValueError: It is no JSON, is nested deeply, or holds text that is not Unicode or a number that no program writes.
    """
    try:
        values = json.loads(text, parse_int=_integer)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if b"\\u" in text:  # half a surrogate pair can be written as an escape, and cannot be printed
        json.dumps(values, ensure_ascii=False).encode()
    return values


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def read_rows(path: Path, *needed: str) -> list[dict[str, Any]]:
    """Read the rows of a file that a process may still be writing.

    Args:
        path: A file that need not exist yet.
        needed: Names that every row must give a count to; all its values are then numbers.

    Returns:
        All rows whose line is complete. A last line without its newline, cut by a kill or still being written, is left
        out, and so is a damaged line, with a warning. Empty if there is no file.
    """
    rows, damaged = sort_rows(path, *needed)
    if damaged:
        logger.warning("%s: %d damaged lines are left out", path, len(damaged))
    return rows


def sort_rows(path: Path, *needed: str) -> tuple[list[dict[str, Any]], list[bytes]]:
    """Read the rows of a file and its damaged lines apart.

    Args:
        path: A file that need not exist yet.
        needed: Names that every row must give a count to; all its values are then numbers.

    Returns:
        The rows, and the complete lines that are not such a JSON object, as they are in the file.
    """
    rows: list[dict[str, Any]] = []
    damaged: list[bytes] = []
    for line in path.read_bytes().split(b"\n")[:-1] if path.is_file() else ():
        try:
            row = parse(line)
        except ValueError:  # a byte that is no UTF-8 is one too
            row = None
        sound = isinstance(row, dict) and (not needed or _is_of_numbers(row, needed))
        rows.append(row) if sound else damaged.append(line)
    return rows, damaged


def _is_of_numbers(row: Mapping[str, Any], counts: Sequence[str]) -> bool:
    numbers = all(isinstance(value, int | float) for value in row.values())
    return numbers and all(0 <= row.get(name, -1) < 2**53 for name in counts)


def newest(rows: Iterable[Mapping[str, Any]], name: str) -> Any:
    """Return the last value that the rows give to `name`, or None if no row has it."""
    return next((row[name] for row in reversed(list(rows)) if name in row), None)
