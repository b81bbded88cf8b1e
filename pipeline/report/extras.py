"""Sections that other commands have measured (efficiency, inference, receptive fields), kept so that a report can take them in.

FOLDER/section.json  FOLDER/tables/*.csv|tex|md  FOLDER/figures/*.pdf|svg
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from pipeline.errors import DataError
from pipeline.files import replace_text
from pipeline.report.figures import Figure
from pipeline.report.tables import Table

SECTION = "section.json"


class Section(NamedTuple):
    title: str
    tables: Sequence[Table]
    figures: Sequence[Figure]


def write_section(folder: Path, section: Section) -> Path:
    """The tables in all forms, and the section for `python -m launchers report --with FOLDER`."""
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
    """Raises DataError if the folder holds none."""
    path = folder / SECTION
    if not path.is_file():
        raise DataError(f"{path} does not exist; give a folder that efficiency, inference or fields has written")
    values = json.loads(path.read_text())
    return Section(values["title"], [Table(**v) for v in values["tables"]], [Figure(**v) for v in values["figures"]])
