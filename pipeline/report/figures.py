"""Draw figures, save them as PDF and SVG for print, and return them as inline SVG in the page's text colour.

Readers with a colour vision deficiency can read them: colours follow Okabe and Ito, lines also differ in dash and points in
shape, and maps use cividis. Ids are not random, so the same numbers give the same file.
"""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import AfterValidator

from pipeline.files import replace_bytes, replace_text
from pipeline.report.svg import drawing

COLOURS = ("#1E88D2", "#E2741A", "#0FA37F", "#CC79A7", "#8C6BB1", "#B8860B")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P")
MAP = "cividis"
_TEXT = "#123456"  # is replaced by the page's text colour
# Names of classes are no formulas: one such as "$\\a$" would end a report, and "$a$" be shown without its signs.
PLAIN_TEXT: dict[Any, Any] = {"text.parse_math": False}
_NAMES = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")

Paint = Callable[[Any], None]  # draws into an empty matplotlib figure
Curve = tuple[list[float], list[float]]  # x, y


@dataclass(frozen=True)
class Figure:
    """A figure for the page; its files for print are in the report's folder.

    Attributes:
        name: Stem of the files, and id on the page.
        title: Heading.
        note: Text below the heading.
        svg: Inline SVG. The page trusts it, so it comes from `svg.drawing`, here and where a section is read.
        wide: The figure takes the page's whole width.
    """

    name: str
    title: str
    note: str
    svg: Annotated[str, AfterValidator(drawing)]
    wide: bool = False


def draw(
    folder: Path,
    name: str,
    title: str,
    paint: Paint,
    *,
    note: str = "",
    size: tuple[float, float] = (4.6, 2.9),
    wide: bool = False,
) -> Figure:
    """Draw a figure twice: for print, in black, and for the page.

    Args:
        folder: Where NAME.pdf and NAME.svg are written.
        name: Stem of the files, and id on the page.
        title: Heading.
        paint: Draws into an empty matplotlib figure.
        note: Text below the heading.
        size: Width and height in inches.
        wide: The figure takes the page's whole width.
    """
    folder.mkdir(parents=True, exist_ok=True)
    replace_bytes(folder / f"{name}.pdf", _render(paint, size, "black", "pdf", name))
    text = _render(paint, size, _TEXT, "svg", name).decode()
    replace_text(folder / f"{name}.svg", text.replace(_TEXT, "#000000"))
    text = text[text.index("<svg") :].replace(_TEXT, "currentColor")
    text = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", text)  # all figures share the page, so ids must differ
    return Figure(name, title, note, drawing(text), wide)


def _render(paint: Paint, size: tuple[float, float], colour: str, suffix: str, salt: str) -> bytes:
    from matplotlib import rc_context
    from matplotlib.figure import Figure as Canvas

    style: dict[Any, Any] = dict.fromkeys(_NAMES, colour) | PLAIN_TEXT
    style |= {"svg.fonttype": "none", "pdf.fonttype": 42, "font.size": 9, "svg.hashsalt": salt, "axes.titlesize": 9}
    style |= {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25}
    style |= {"legend.frameon": False, "legend.fontsize": 8, "axes.axisbelow": True}
    with rc_context(style):
        canvas = Canvas(figsize=size, layout="constrained")
        paint(canvas)
        out = io.BytesIO()
        dates = {"Date": None} if suffix == "svg" else {"CreationDate": None}
        canvas.savefig(out, format=suffix, transparent=True, metadata=dates)
    return out.getvalue()


def lines(
    series: dict[str, list[Curve]], xlabel: str, ylabel: str, *, logy: bool = False, at: Sequence[float] | None = None
) -> Paint:
    """Make curves, with one colour and dash per quantity.

    Several runs of a quantity are thin lines around their mean, if they share their steps.

    Args:
        series: Label of a quantity -> its runs.
        xlabel: Label of the x axis.
        ylabel: Label of the y axis.
        logy: Use a logarithmic y axis.
        at: The few values of x that were measured; each gets a marker and a tick, on a logarithmic x axis.
    """

    def paint(canvas: Any) -> None:
        from matplotlib.ticker import LogFormatter

        axes = canvas.subplots()
        for i, (label, runs) in enumerate(series.items()):
            style: dict[str, Any] = {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i % len(DASHES)]}
            style |= {"marker": MARKERS[i % len(MARKERS)] if at or max(len(x) for x, _ in runs) == 1 else ""}
            shared = len(runs) > 1 and all(list(x) == list(runs[0][0]) for x, _ in runs)
            for k, (x, y) in enumerate(runs):
                thin = {"linewidth": 0.7, "alpha": 0.45} if shared else {"linewidth": 1.5}
                axes.plot(x, y, **style, **thin, label=None if shared or k else label)
            if shared:
                axes.plot(runs[0][0], np.mean([y for _, y in runs], 0), **style, linewidth=1.7, label=label)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        if logy:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(LogFormatter())  # the default writes formulas
            axes.yaxis.set_minor_formatter(LogFormatter())
        if at:
            axes.set_xscale("log", base=2)
            axes.set_xticks(at, [f"{x:g}" for x in at])
            axes.xaxis.minorticks_off()
        if len(series) > 1:
            _legend(axes)

    return paint


def pareto_front(points: dict[str, tuple[float, float]], joined: Sequence[str], xlabel: str, ylabel: str) -> Paint:
    """Make a Pareto front: points with their names, some of them joined by a line.

    Args:
        points: Name -> x and y; the label is the name up to a colon.
        joined: Names of the points on the line.
        xlabel: Label of the x axis.
        ylabel: Label of the y axis.
    """

    def paint(canvas: Any) -> None:
        axes = canvas.subplots()
        line = sorted(points[name] for name in joined if name in points)
        axes.plot([x for x, _ in line], [y for _, y in line], "-o", color=COLOURS[0], markersize=5)
        others = [place for name, place in points.items() if name not in joined]
        axes.plot([x for x, _ in others], [y for _, y in others], "s", color=COLOURS[1], markersize=5)
        around = [name for name in points if name not in joined]
        for name, place in points.items():
            angle = 2 * np.pi * around.index(name) / len(around) if name in around else 1.25 * np.pi
            right, up = (
                20 * np.cos(angle),
                20 * np.sin(angle),
            )  # on changing sides, because some points lie close together
            axes.annotate(
                name.split(":")[0], place, xytext=(right, up), textcoords="offset points", fontsize=8,
                ha="left" if right > 0 else "right", va="center", arrowprops={"arrowstyle": "-", "lw": 0.4, "color": "#888888"},
            )  # fmt: skip
        axes.margins(x=0.28, y=0.15)
        axes.set(xlabel=xlabel, ylabel=ylabel)

    return paint


def shortened(name: str, letters: int) -> str:
    """Cut a name that is too long for its place, so that its beginning and its end remain."""
    if len(name) <= letters:
        return name
    end = max(1, (letters - 1) // 3)
    return f"{name[: letters - 1 - end]}…{name[-end:]}"


def _legend(axes: Any) -> Any:
    """Put the legend above the axes, where it covers no line."""
    longest = max(map(len, axes.get_legend_handles_labels()[1]))
    columns = 3 if longest < 16 else 2
    return axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=columns, borderaxespad=0.2, columnspacing=1.2)


def accuracy_against_frequency(labelled: dict[str, int], models: dict[str, dict[str, float | None]]) -> Paint:
    """Make the accuracy of each class, sorted by labelled images.

    Args:
        labelled: Class -> its labelled images.
        models: Row of the table -> class -> accuracy in percent, None without samples. A thin line joins the first and the
            last model.
    """

    def paint(canvas: Any) -> None:
        axes = canvas.subplots()
        names = list(labelled)
        counts = np.array([labelled[n] for n in names], float)
        order = np.argsort(-counts, kind="stable")
        x = np.empty(len(names))
        x[order] = np.arange(len(names))
        found = {
            row: np.array([np.nan if v.get(n) is None else v[n] for n in names], float) for row, v in models.items()
        }
        values = list(found.values())
        if len(values) > 1:
            axes.vlines(x, values[0], values[-1], color="#888888", linewidth=0.8, alpha=0.7)
        for i, (row, y) in enumerate(found.items()):
            axes.plot(
                x,
                y,
                MARKERS[i],
                color=COLOURS[i],
                label=row,
                markersize=5 if len(names) <= 40 else 2.5,
                markerfacecolor="none" if i == 0 else COLOURS[i],
            )
        few = len(names) <= 20
        ticks = np.arange(len(names)) if few else np.linspace(0, len(names) - 1, 6).astype(int)
        letters_that_fit = max(3, 60 // len(ticks))  # longer names stand upright
        upright = few and max(len(names[order[t]]) for t in ticks) > letters_that_fit
        words = [shortened(names[order[t]], 16 if upright else letters_that_fit) for t in ticks]
        labels = [
            f"{word}{', ' if upright else chr(10)}{int(counts[order[t]])}" for word, t in zip(words, ticks, strict=True)
        ]
        axes.set_xticks(ticks, labels, rotation=90 if upright else 0, fontsize=7 if upright else None)
        axes.set(xlabel="class, with its number of labelled images", ylabel="accuracy, percent", ylim=(-4, 104))
        _legend(axes)

    return paint


def group_intervals(models: dict[str, dict[str, Any]], groups: Sequence[str]) -> Paint:
    """Make the accuracy of each group with its bootstrap interval.

    Args:
        models: Row of the table -> metrics of the model.
        groups: Names of the groups, from left to right.
    """

    def paint(canvas: Any) -> None:
        axes = canvas.subplots()
        shift = 0.8 / max(1, len(models))
        for i, (row, report) in enumerate(models.items()):
            there = [g for g in groups if g in report and g in report.get("intervals", {})]
            x = np.array([groups.index(g) for g in there]) + (i - (len(models) - 1) / 2) * shift
            y = np.array([report[g] for g in there])
            low, high = np.array([report["intervals"][g] for g in there]).T
            axes.errorbar(
                x, y, yerr=[np.maximum(y - low, 0), np.maximum(high - y, 0)], fmt=MARKERS[i], color=COLOURS[i],
                capsize=3, label=row, markersize=5,
            )  # fmt: skip
        axes.set_xticks(range(len(groups)), groups)
        axes.set(ylabel="accuracy, percent", xlim=(-0.6, len(groups) - 0.4))
        _legend(axes)

    return paint


def reliability_diagram(models: dict[str, list[dict[str, float]]]) -> Paint:
    """Make accuracy against confidence; a calibrated classifier lies on the diagonal.

    Args:
        models: Row of the table -> bins of `calibration.reliability`. The area of a point is its share of the images.
    """

    def paint(canvas: Any) -> None:
        axes = canvas.subplots()
        axes.plot([0, 1], [0, 1], color="#888888", linewidth=0.8, linestyle=":")
        for i, (row, bins) in enumerate(models.items()):
            there = [b for b in bins if b["samples"]]
            total = sum(b["samples"] for b in there)
            x, y = [b["confidence"] for b in there], [b["accuracy"] for b in there]
            axes.plot(x, y, color=COLOURS[i], linestyle=DASHES[i], linewidth=1)
            size = [8 + 220 * b["samples"] / total for b in there]
            axes.scatter(x, y, s=size, marker=MARKERS[i], color=COLOURS[i], alpha=0.75, label=row)
        axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1.03), ylim=(-0.03, 1.03))
        legend = _legend(axes)
        for handle in legend.legend_handles:
            handle.set_sizes([25])

    return paint


def confusion_map(table: np.ndarray, rows: Sequence[str], columns: Sequence[str]) -> Paint:
    """Make a confusion map, in percent of each true class.

    Args:
        table: Counts, true class by predicted class.
        rows: Names of the true classes.
        columns: Names of the predicted classes.
    """

    def paint(canvas: Any) -> None:
        axes = canvas.subplots()
        share = 100 * table / np.maximum(table.sum(1, keepdims=True), 1)
        image = axes.imshow(share, cmap=MAP, vmin=0, vmax=100, aspect="auto")
        size = 8 if len(columns) <= 20 else 5
        upright = max(map(len, columns)) > 3
        axes.set_xticks(
            range(len(columns)), [shortened(c, 14) for c in columns], rotation=90 if upright else 0, fontsize=size
        )
        axes.set_yticks(range(len(rows)), [shortened(r, 14) for r in rows], fontsize=8 if len(rows) <= 14 else 5)
        axes.set(xlabel="predicted class", ylabel="true class")
        axes.grid(visible=False)
        if table.size <= 150:
            for (r, c), value in np.ndenumerate(share):
                if value >= 0.5:
                    axes.text(c, r, f"{value:.0f}", ha="center", va="center", fontsize=7,
                              color="black" if value > 50 else "white")  # fmt: skip
        canvas.colorbar(image, ax=axes, label="percent of the class")

    return paint


def picture_grid(
    pictures: Sequence[Sequence[np.ndarray]], rows: Sequence[str], columns: Sequence[Sequence[str]]
) -> Paint:
    """Make a grid of pictures.

    Args:
        pictures: Pictures (H, W, 3) or maps (H, W), both in [0, 1], row by row.
        rows: Name of each row.
        columns: Title of each picture of each row.
    """

    def paint(canvas: Any) -> None:
        across = len(pictures[0])
        letters_that_fit = max(6, int(15 * canvas.get_figwidth() / across))
        axes = canvas.subplots(len(pictures), across, squeeze=False)
        for r, row in enumerate(pictures):
            for place in axes[r, len(row) :]:  # the last block may have fewer
                place.set_axis_off()
            for c, picture in enumerate(row):
                place = axes[r, c]
                colours = {"cmap": MAP, "vmin": 0, "vmax": 1} if picture.ndim == 2 else {}
                place.imshow(picture, interpolation="nearest", **colours)
                place.set_xticks([])
                place.set_yticks([])
                place.grid(visible=False)
                place.spines[:].set_visible(False)
                place.set_title(shortened(columns[r][c], letters_that_fit), fontsize=8, pad=2)
            axes[r, 0].set_ylabel(rows[r], fontsize=8)

    return paint
