"""Sections that other commands measure (efficiency, inference, Pareto front, receptive fields), kept for reports.

FOLDER/section.json  FOLDER/tables/*.csv|tex|md  FOLDER/figures/*.pdf|svg
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from pydantic import TypeAdapter, ValidationError

from pipeline.errors import DataError
from pipeline.files import replace_text
from pipeline.report.figures import Figure
from pipeline.report.tables import Table

SECTION = "section.json"
_LARGEST = 2**26  # bytes of one; some figures of 100 KiB are usual


class Section(NamedTuple):
    """A title with the tables and figures below it."""

    title: str
    tables: Sequence[Table]
    figures: Sequence[Figure]


def write_section(folder: Path, section: Section) -> Path:
    """Write a section for `python -m pipeline.report --with FOLDER`, and its tables in all forms.

    Returns:
        `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for table in section.tables:
        table.write(folder / "tables")
    values = {
        "title": section.title,
        "tables": [asdict(table) for table in section.tables],
        "figures": [asdict(figure) for figure in section.figures],
    }
    replace_text(folder / SECTION, json.dumps(values))
    return folder


def read_section(folder: Path) -> Section:
    """Read what `write_section` wrote, by a command here or by somebody else. A figure keeps only what draws.

    Raises:
        DataError: If the folder holds no section, or a damaged one.
    """
    path = folder / SECTION
    if not path.is_file():
        raise DataError(
            f"{path} does not exist; give --with a folder that efficiency, inference, pareto or fields has written"
        )
    if path.stat().st_size > _LARGEST:
        raise DataError(f"{path} has more than {_LARGEST >> 20} MiB, so it is no section; measure it again")
    try:
        return TypeAdapter(Section).validate_json(path.read_bytes())
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))[:80]
        raise DataError(f"{path} is damaged ({where}: {error.errors()[0]['msg']}); measure it again") from None


def show_section(folder: Path) -> str:
    """Return the section's tables as Markdown, and how to put the section into a report."""
    tables = [table.markdown() for table in read_section(folder).tables]
    return "\n".join([*tables, f"written to {folder}; put it into a report with --with {folder}"])
