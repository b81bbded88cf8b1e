"""Files of a run with one JSON object, or with one a line such as metrics.jsonl: the one place that reads them."""

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


def read_object(path: Path) -> dict[str, Any]:
    """Return the object of a JSON file; empty if there is no file, and with a warning if it is damaged."""
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        values = None
    if isinstance(values, dict):
        return values
    logger.warning("%s is damaged and is left out", path)
    return {}


def read_rows(path: Path, *needed: str) -> list[dict[str, Any]]:
    """Read the rows of a file that a process may still be writing.

    Args:
        path: A file that need not exist yet.
        needed: Names that every row must give a number to.

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
        needed: Names that every row must give a number to.

    Returns:
        The rows, and the complete lines that are not such a JSON object, as they are in the file.
    """
    rows: list[dict[str, Any]] = []
    damaged: list[bytes] = []
    for line in path.read_bytes().split(b"\n")[:-1] if path.is_file() else ():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # a byte that is no UTF-8 is a ValueError too
            row = None
        sound = isinstance(row, dict) and all(isinstance(row.get(name), int | float) for name in needed)
        rows.append(row) if sound else damaged.append(line)
    return rows, damaged


def newest(rows: Iterable[Mapping[str, Any]], name: str) -> Any:
    """Return the last value that the rows give to `name`, or None if no row has it."""
    return next((row[name] for row in reversed(list(rows)) if name in row), None)
