"""Write the report of one or more experiments: an HTML page without scripts or network, and the same as files.

NAME/report.html   NAME/report/{report.md, tables/*.csv|tex|md, figures/*.pdf|svg}
"""

import base64
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, Template, select_autoescape
from markupsafe import Markup

from pipeline.files import replace_bytes, replace_text
from pipeline.report import accuracy, sections
from pipeline.report.ablation import Compare, ablation_table, designs_of
from pipeline.report.extras import Section
from pipeline.report.figures import draw
from pipeline.report.results import STAGES, Result, evaluated_rows, read_result
from pipeline.report.tables import Table
from pipeline.report.verdict import Worth, advise


class LabelNext(NamedTuple):
    """Unlabelled images that are worth labelling next.

    Attributes:
        sheet: Contact sheet, a PNG.
        table: CSV with an empty column for the labels.
        number: How many images.
        pool: How many unlabelled images there are.
    """

    sheet: bytes
    table: str
    number: int
    pool: int


class Panel(NamedTuple):
    """A wide figure that is drawn from models and not from files.

    Attributes:
        name: Stem of its files.
        title: Heading.
        note: Text below the heading.
        paint: Draws it, for example `figures.picture_grid(...)`.
        size: Width and height in inches.
    """

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
    worth: Worth | None = None,
    label_next: LabelNext | None = None,
) -> Path:
    """Write the page, and the folder of the same name beside it.

    Experiments that differ only in their seeds are one design, shown as means and standard deviations. Several designs are
    compared in a table; the other tables, the curves and the figures are those of the first design.

    Args:
        experiments: Folders of experiments.
        path: The page.
        panels: Figures of where the models look.
        compare: Computes the gains between two designs.
        extras: Sections that other commands have measured.
        worth: Whether the stages were worth it, for the experiments of the first design.
        label_next: Images worth labelling next, for the first experiment.

    Returns:
        `path`.

    Raises:
        DataError: If a folder is not an experiment.
    """
    results = [read_result(e) for e in experiments]
    designs = designs_of(results)
    shown = designs[0].results
    beside = path.with_suffix("")
    figures = beside / "figures"
    rows = evaluated_rows(shown)
    tables: list[Table] = accuracy.tables(shown, rows) if rows else []
    if len(designs) > 1 and compare and evaluated_rows(results):
        tables.insert(0, ablation_table(designs, compare))
    running = [sections.speed(shown), *sections.plans(shown), *sections.incidents(results)]
    worth_tables = worth.tables() if worth else []
    for table in [*tables, *running, *worth_tables]:
        table.write(beside / "tables")
    if label_next:
        replace_text(beside / "label-next.csv", label_next.table)
        replace_bytes(beside / "label-next.png", label_next.sheet)
    page = {
        "title": path.parent.name,
        "results": results,
        "designs": designs,
        # Experiments on the same data have the same findings.
        "data": list({f["text"]: f for r in results for f in r.data_findings if f["level"] != "note"}.values()),
        "headline": accuracy.headline(shown, rows) if rows else [],
        "protocols": list(dict.fromkeys(r.protocol.rsplit("; seed", 1)[0] for r in results if r.protocol)),
        "labels": list(dict.fromkeys(note for r in results for note in r.label_notes())),
        "worth": worth,
        "worth_tables": worth_tables,
        "advice": advise(shown[0], worth, experiments[0].as_posix()) if worth and rows else [],
        "label_next": label_next,
        "sheet": _data_uri(beside / "label-next.png") if label_next else "",
        "experiment": experiments[0].as_posix(),
        "tables": {table.name: table for table in tables},
        "running": running,
        "accuracy": accuracy.figures(shown, rows, figures) if rows else [],
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


def _data_uri(path: Path) -> str:
    """Return a PNG as a data URI."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def _pictures(results: Sequence[Result], stage: str) -> list[tuple[str, str]]:
    """Return name and data URI of the pictures in a stage's report folder, of the first experiment."""
    run = results[0].stages.get(stage)
    found = sorted(p for p in (run.folder / "report").glob("*.png") if p.is_file()) if run else []
    return [(p.stem.replace("_", " "), _data_uri(p)) for p in found]


def _stacked(cell: str) -> Markup:
    """Put an interval in brackets below its value, so that wide tables fit the page."""
    value, bracket, interval = cell.partition(" [")
    return Markup("{} <small>[{}</small>").format(value, interval) if bracket else Markup("{}").format(cell)


def _inert(value: Any) -> Any:
    """Take tags, links and pictures out of a text for Markdown: names of classes and incidents may come from anybody."""
    return str(value).replace("<", "&lt;").replace("](", "]\\(")


def _template(name: str) -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=select_autoescape(["html"]), trim_blocks=True,
        lstrip_blocks=True, finalize=_inert if name.endswith(".md") else None,
    )  # fmt: skip
    environment.filters["stacked"] = _stacked
    return environment.get_template(name)
