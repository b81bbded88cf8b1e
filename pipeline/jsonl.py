"""Files with one JSON object a line, such as metrics.jsonl: the one place that reads them."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a file that a process may still be writing.

    Args:
        path: A file that need not exist yet.

    Returns:
        All rows whose line is complete. A last line without its newline, cut by a kill or still being written, is left
        out. Empty if there is no file.
    """
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def newest(rows: Iterable[Mapping[str, Any]], name: str) -> Any:
    """Return the last value that the rows give to `name`, or None if no row has it."""
    return next((row[name] for row in reversed(list(rows)) if name in row), None)
