"""The report of one or more experiments: one page that needs nothing else, the same in Markdown, every table as CSV and
LaTeX, every figure as PDF and SVG.

NAME/report.html   NAME/report/{report.md, tables/*.csv|tex|md, figures/*.pdf|svg}
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, Template, select_autoescape

from pipeline.files import replace_text
from pipeline.report import accuracy, sections
from pipeline.report.ablation import Compare, ablation_table, designs_of
from pipeline.report.extras import Section
from pipeline.report.figures import Figure, data_uri, draw
from pipeline.report.results import STAGES, Result, judged_rows, read_result
from pipeline.report.tables import Table


class Panel(NamedTuple):
    """Pictures that others have made of models: drawn by `paint` of `figures.picture_grid` and its like."""

    name: str
    title: str
    note: str
    paint: Callable[[Any], None]
    size: tuple[float, float]


def write_report(
    experiments: Sequence[Path],
    path: Path,
    *,
    panels: Sequence[Panel] = (),
    compare: Compare | None = None,
    extras: Sequence[Section] = (),
) -> Path:
    """Write the page at `path` (and what lies beside it) and return where it is.

    Experiments that differ in seeds only are one design: means and spreads. Several designs are joined into a table of
    what differs, with `compare` for the gains; curves and figures are of the first. Raises DataError for a folder that is
    no experiment.
    """
    results = [read_result(e) for e in experiments]
    designs = designs_of(results)
    shown = designs[0].results
    beside = path.with_suffix("")
    figures = beside / "figures"
    rows = judged_rows(shown)
    tables: list[Table] = accuracy.tables(shown, rows) if rows else []
    if len(designs) > 1 and compare and judged_rows(results):
        tables.insert(0, ablation_table(designs, compare))
    running = [sections.speed(shown), *sections.plans(shown), *sections.incidents(results)]
    for table in [*tables, *running]:
        table.write(beside / "tables")
    page = {
        "title": path.parent.name,
        "results": results,
        "designs": designs,
        "headline": accuracy.headline(shown, rows) if rows else [],
        "protocols": list(dict.fromkeys(r.protocol.rsplit("; seed", 1)[0] for r in results if r.protocol)),
        "tables": {table.name: table for table in tables},
        "running": running,
        "judged": accuracy.figures(shown, rows, figures) if rows else [],
        "stages": [
            (
                title,
                sections.curves(shown, stage, sections.CURVES, figures),
                sections.curves(shown, stage, sections.ENGINE, figures),
                _pictures(shown, stage),
            )
            for stage, title in STAGES.items()
        ],
        "panels": [draw(figures, p.name, p.title, p.paint, note=p.note, size=p.size, wide=True) for p in panels],
        "lineage": [(r.name, sections.lineage(r)) for r in results],
        "environment": next((s.environment for s in shown[0].stages.values() if s.environment), {}),
        "extras": extras,
        "beside": beside.name,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, _template("template.html").render(page))
    replace_text(beside / "report.md", _template("template.md").render(page))
    return path


def _pictures(results: Sequence[Result], stage: str) -> list[tuple[str, str]]:
    """(what it is, data URI) of the pictures that a stage has left in its report folder; of the first experiment."""
    run = results[0].stages.get(stage)
    found = sorted((run.folder / "report").glob("*.png")) if run else []
    return [(p.stem.replace("_", " "), data_uri(p)) for p in found]


def _template(name: str) -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=select_autoescape(["html"]), trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["json"] = lambda value: json.dumps(value)
    return environment.get_template(name)


__all__ = ["Figure", "Panel", "write_report"]
