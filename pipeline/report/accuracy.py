"""Tables and figures of accuracy, from the evaluations of one design's experiments."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from pipeline.report.figures import (
    Figure,
    accuracy_against_frequency,
    confusion_map,
    draw,
    group_intervals,
    reliability_diagram,
)
from pipeline.report.results import ROWS, Result, mean_and_spread
from pipeline.report.tables import Table

SHOWN = ("top1", "top5", "balanced", "head", "medium", "tail", "ece", "nll")
GROUPS = ("head", "medium", "tail")
PLURAL = {"tail class": "tail classes", "class": "all classes"}
NUM_MISTAKES = 12  # rows of the table of mistakes
MAX_MAP_CLASSES = 40  # with more classes the confusion map is left out


def headline(results: Sequence[Result], rows: Sequence[str]) -> list[tuple[str, str]]:
    """Return a few numbers for the top of the page, each with its words."""
    last = rows[-1]
    found = []
    metrics = [("top1", "top-1 accuracy")]
    metrics += [("tail", "tail accuracy")] if _have_groups(results, rows) else []
    for metric, words in metrics:
        value = mean_and_spread(results, last, metric)
        before = mean_and_spread(results, rows[0], metric)
        if value:
            found.append((f"{value[0]:.1f} %", f"{words}, {last}"))
        if value and before and last != rows[0]:
            found.append((f"{value[0] - before[0]:+.1f}", f"points of {words} over {rows[0]}"))
    return found


def tables(results: Sequence[Result], rows: Sequence[str]) -> list[Table]:
    """Make the tables of accuracy, of every class, and of the most frequent mistakes, on tail classes if there are such.

    Args:
        results: Experiments of one design.
        rows: Rows of the table that they have evaluated.
    """
    several = len(results) > 1
    first = next(r.models[rows[-1]] for r in results if rows[-1] in r.models)
    means = "Mean ± standard deviation over the experiments. " if several else ""
    brackets = "" if several else " Brackets hold 95 % bootstrap intervals; test images are redrawn inside each class."
    grouped = _have_groups(results, rows)
    members = first["groups"].items() if grouped else ()
    groups = "; ".join(f"{name}: {_some(classes)}" for name, classes in members if classes)
    note = (
        f"{means}Percent (nll in nats) on {first['samples']} {_evaluated_on(results, rows)}, each counted once.{brackets} "
        "ece: expected calibration error; nll: mean negative log-likelihood."
        + (f" Classes of each group: {groups}." if groups else "")
    )
    shown = [m for m in SHOWN if (grouped or m not in GROUPS) and any(mean_and_spread(results, row, m) for row in rows)]
    accuracy = Table(
        name="accuracy",
        title="Accuracy",
        header=["", *shown],
        rows=[[row, *(_cell(results, row, m) for m in shown)] for row in rows],
        note=note,
    )
    return [accuracy, _per_class(results, rows), _confusions(results, rows[-1], grouped)]


def figures(results: Sequence[Result], rows: Sequence[str], folder: Path) -> list[Figure]:
    """Draw the figures of accuracy: the first and the last of `rows` side by side.

    Args:
        results: Experiments of one design.
        rows: Rows of the table that they have evaluated.
        folder: Folder of the figures.
    """
    compared = [rows[0], rows[-1]] if len(rows) > 1 else list(rows)
    models = {row: _pooled(results, row) for row in compared}
    source = results[0].name if len(results) == 1 else f"Means over {len(results)} experiments"
    drawn, grouped = [], _have_groups(results, compared)
    if grouped:
        paint = group_intervals({row: results[0].models[row] for row in compared if row in results[0].models}, GROUPS)
        note = f"{results[0].name}: mean accuracy of the classes of each group, with 95 % bootstrap intervals."
        drawn.append(draw(folder, "groups", "Head, medium and tail", paint, note=note))
    labelled = results[0].labelled_per_class()
    if labelled:
        per_class = {row: found["per_class"] for row, found in models.items()}
        note = f"{source}: classes are sorted by their number of labelled images."
        drawn.append(
            draw(
                folder,
                "classes",
                "Accuracy of each class",
                accuracy_against_frequency(labelled, per_class),
                note=note,
            )
        )
    bins = {row: found["reliability"] for row, found in models.items() if found["reliability"]}
    if bins:
        note = "Below the dotted line, confidence exceeds accuracy. The area of a point is its share of the images."
        drawn.append(draw(folder, "reliability", "Calibration of confidence", reliability_diagram(bins), note=note))
    last = models[compared[-1]]
    names = list(last["per_class"])
    chosen, kind = _looked_at(last, grouped)
    if chosen and len(names) <= MAX_MAP_CLASSES:
        paint = confusion_map(last["confusion"][chosen], [names[c] for c in chosen], names)
        note = f"{compared[-1]}: percentage of the images of each {kind} that is predicted as each class."
        drawn.append(draw(folder, "confusion", f"Predictions on {PLURAL[kind]}", paint, note=note))
    return drawn


def _have_groups(results: Sequence[Result], rows: Sequence[str]) -> bool:
    """Whether classes are grouped in all experiments; where all classes have as many images they are not."""
    return all(set(GROUPS) & set(r.models[row].get("groups", {})) for r in results for row in rows if row in r.models)


def _looked_at(pooled: dict[str, Any], grouped: bool) -> tuple[list[int], str]:
    """Return the classes whose mistakes are shown, those of the tail if there is one, and what such a class is called."""
    names, tail = list(pooled["per_class"]), pooled["groups"].get("tail", []) if grouped else []
    return ([names.index(name) for name in tail], "tail class") if tail else (list(range(len(names))), "class")


def _evaluated_on(results: Sequence[Result], rows: Sequence[str]) -> str:
    """Return the words of the stage of the last row, which may have chosen its state by these images where another has not."""
    stages = results[0].stages
    found = [stages[ROWS[row][0]].evaluation.get("evaluated_on") for row in reversed(rows) if ROWS[row][0] in stages]
    return next((words for words in found if words), "test images")


def _pooled(results: Sequence[Result], row: str) -> dict[str, Any]:
    """Pool one model over several experiments: means of accuracies, sums of counts."""
    there = [r.models[row] for r in results if row in r.models]
    per_class = {}
    for name in there[0]["per_class"]:
        values = [m["per_class"][name] for m in there if m["per_class"].get(name) is not None]
        per_class[name] = fmean(values) if values else None
    bins = []
    for alike in zip(*(m.get("reliability", []) for m in there), strict=False):
        total = sum(b["samples"] for b in alike)
        mean = {k: sum(b["samples"] * b[k] for b in alike) / max(1, total) for k in ("confidence", "accuracy")}
        bins.append({"samples": total, **mean})
    confusion = np.sum([m["confusion"] for m in there], axis=0)
    return {"per_class": per_class, "reliability": bins, "confusion": confusion, "groups": there[0].get("groups", {})}


def _cell(results: Sequence[Result], row: str, metric: str) -> str:
    found = mean_and_spread(results, row, metric)
    if found is None:
        return "–"
    digits = 3 if metric == "nll" else 2
    text = f"{found[0]:.{digits}f}"
    if len(results) > 1:
        return f"{text} ± {found[1]:.{digits - 1}f}"
    interval = results[0].models[row].get("intervals", {}).get(metric)
    return f"{text} [{interval[0]:.1f}, {interval[1]:.1f}]" if interval else text


def _per_class(results: Sequence[Result], rows: Sequence[str]) -> Table:
    labelled = results[0].labelled_per_class()
    pooled = {row: _pooled(results, row)["per_class"] for row in rows}
    names = list(pooled[rows[-1]])
    names.sort(key=lambda n: -labelled.get(n, 0))
    cells = [
        [n, str(labelled.get(n, "–")), *("–" if pooled[row][n] is None else f"{pooled[row][n]:.1f}" for row in rows)]
        for n in names
    ]
    first = " of the first experiment" if len(results) > 1 else ""
    note = f"Accuracy in percent; classes are sorted by their number of labelled images{first}."
    return Table(
        name="per_class", title="Accuracy of each class", header=["class", "labelled", *rows], rows=cells, note=note
    )


def _confusions(results: Sequence[Result], row: str, grouped: bool) -> Table:
    pooled = _pooled(results, row)
    names = list(pooled["per_class"])
    counts = pooled["confusion"]
    chosen, kind = _looked_at(pooled, grouped)
    pairs = [(int(counts[c, k]), c, int(k)) for c in chosen for k in np.flatnonzero(counts[c]) if k != c]
    pairs.sort(key=lambda p: (-p[0], p[1], p[2]))
    cells = [[names[c], names[k], f"{100 * n / counts[c].sum():.1f}", str(n)] for n, c, k in pairs[:NUM_MISTAKES]]
    return Table(
        name="confusions",
        title=f"Mistakes on {PLURAL[kind]}",
        header=["true class", "predicted class", "percent of the class", "images"],
        rows=cells,
        note=f"{row}: the {len(cells)} most frequent mistakes"
        + (f", summed over {len(results)} experiments." if len(results) > 1 else "."),
    )


def _some(names: Sequence[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
