"""What was planned of an experiment beside what it really took: plan.json against the run folders."""

import json
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple


class Compared(NamedTuple):
    stage: str
    what: str
    planned: float
    actual: float
    unit: str


def compare(experiment: Path) -> list[Compared]:
    """A row per quantity of each stage that is both planned and run; empty without a plan."""
    path = experiment / "plan.json"
    if not path.is_file():
        return []
    rows = []
    for stage in json.loads(path.read_text())["stages"]:
        actual = measured(experiment / stage["stage"])
        planned = stage | {"memory_gib": stage["memory"][str(stage["zero_stage"])]["device"] / 2**30}
        units = {"steps": "", "step_seconds": "s", "hours": "h", "checkpoint_bytes": "B", "memory_gib": "GiB"}
        rows += [
            Compared(stage["stage"], what.replace("_", " "), planned[what], actual[what], unit)
            for what, unit in units.items()
            if what in actual
        ]
    return rows


def measured(run: Path) -> dict[str, float]:
    """steps, seconds of a step (median), hours of training, peak memory of rank 0 and bytes of the newest checkpoint."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        return {}
    lines = (json.loads(line) for line in path.read_text().splitlines() if line.endswith("}"))
    rows: list[dict[str, Any]] = [row for row in lines if "perf/step_seconds" in row]
    if not rows:
        return {}
    steps = [row["step"] for row in rows]
    each = [after - before for before, after in zip([0, *steps], steps, strict=False)]
    found = {
        "steps": float(steps[-1]),
        "step_seconds": median(row["perf/step_seconds"] for row in rows),
        "hours": sum(n * row["perf/step_seconds"] for n, row in zip(each, rows, strict=True)) / 3600,
        "memory_gib": max(row["perf/memory_gib"] for row in rows),
    }
    newest = max(run.glob("checkpoints/step_*/COMPLETE"), default=None)
    if newest:
        found["checkpoint_bytes"] = float(sum(p.stat().st_size for p in newest.parent.iterdir()))
    return found
