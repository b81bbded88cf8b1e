"""The outcome of experiments as numbers: what evaluation.json files say, side by side."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

METRICS = ("top1", "head", "medium", "tail")
# Row of the table -> (stage, model in its evaluation.json).
ROWS = {
    "stage 2": ("distill", "student"),
    "stage 3, student": ("semi", "student"),
    "stage 3, teacher": ("semi", "teacher"),
}


class Result(NamedTuple):
    """One experiment: the protocol it was judged by, and per row of the table the model's report."""

    experiment: Path
    protocol: str
    split: str | None
    models: dict[str, dict[str, Any]]


def read_result(experiment: Path) -> Result:
    """The evaluations of an experiment's stages that are complete."""
    models, protocol, split = {}, "", None
    for row, (stage, model) in ROWS.items():
        path = experiment / stage / "evaluation.json"
        if path.is_file():
            evaluation = json.loads(path.read_text())
            protocol, split = evaluation["protocol"], evaluation["split"]
            models[row] = evaluation["models"][model]
    return Result(experiment, protocol, split, models)


def mean_and_spread(results: Sequence[Result], row: str, metric: str) -> tuple[float, float]:
    """Mean over experiments and sample standard deviation (0 for one)."""
    values = [r.models[row][metric] for r in results if row in r.models]
    return fmean(values), stdev(values) if len(values) > 1 else 0.0


def table(results: Sequence[Result]) -> str:
    """Accuracies in percent on the test set, one line a model, mean ± standard deviation over experiments."""
    rows = [row for row in ROWS if any(row in r.models for r in results)]
    lines = [f"{'':18s}" + "".join(f"{m:>15s}" for m in METRICS)]
    for row in rows:
        cells = (mean_and_spread(results, row, m) for m in METRICS)
        alone = len(results) == 1
        lines.append(f"{row:18s}" + "".join(f"{m:15.2f}" if alone else f"{m:9.2f} ±{s:4.1f}" for m, s in cells))
    samples = results[0].models[rows[0]]["samples"]
    protocol = results[0].protocol.rsplit("; seed", 1)[0]
    lines.append(f"{len(results)} seed{'s' if len(results) > 1 else ''}; {samples} test images; {protocol}")
    return "\n".join(lines)
