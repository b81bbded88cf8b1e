"""What the folders of experiments say, read once: numbers of evaluations, curves, cards, incidents, plans."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import yaml

from pipeline.errors import DataError

METRICS = ("top1", "head", "medium", "tail")
STAGES = {"arm": "Stage 1: ARM pretraining", "distill": "Stage 2: supervised", "semi": "Stage 3: semi-supervised"}
# Row of the table -> (stage, model in its evaluation.json).
ROWS = {
    "stage 2": ("distill", "student"),
    "stage 3, student": ("semi", "student"),
    "stage 3, teacher": ("semi", "teacher"),
}


@dataclass(frozen=True, kw_only=True)
class StageRun:
    """One stage's folder as far as it has come; what is not there yet is empty."""

    folder: Path
    rows: list[dict[str, float]]  # of metrics.jsonl
    config: dict[str, Any]
    environment: dict[str, Any]
    status: dict[str, Any]
    plan: dict[str, Any]
    incidents: list[dict[str, Any]]
    evaluation: dict[str, Any]
    card: dict[str, Any]

    def curve(self, name: str) -> tuple[list[float], list[float]]:
        """Steps and values of one line of the log."""
        pairs = [(row["step"], row[name]) for row in self.rows if name in row]
        return [step for step, _ in pairs], [value for _, value in pairs]

    def seconds(self) -> float:
        """Spent in training steps, from their logged means; evaluations and saves are not in it."""
        total, before = 0.0, 0.0
        for row in self.rows:
            if "perf/step_seconds" in row:
                total += (row["step"] - before) * row["perf/step_seconds"]
                before = row["step"]
        return total


@dataclass(frozen=True, kw_only=True)
class Result:
    """One experiment: its stages, the protocol it was judged by, and per row of the table the model's report."""

    experiment: Path
    stages: dict[str, StageRun]
    protocol: str
    split: str | None
    models: dict[str, dict[str, Any]]

    @property
    def name(self) -> str:
        return self.experiment.name

    def seed(self, stage: str) -> int:
        return int(self.stages[stage].config.get("run", {}).get("seed", 0))

    def labelled_per_class(self) -> dict[str, int]:
        found = [s.evaluation.get("labelled_per_class", {}) for s in self.stages.values()]
        return next((counts for counts in reversed(found) if counts), {})


def read_result(experiment: Path) -> Result:
    """Whatever the stages of an experiment have written. Raises DataError if there is none."""
    stages = {stage: _read_stage(experiment / stage) for stage in STAGES if (experiment / stage).is_dir()}
    if not stages:
        known = [p.name for p in sorted(experiment.parent.glob("*")) if any((p / stage).is_dir() for stage in STAGES)]
        raise DataError(
            f"{experiment} holds no stage ({', '.join(STAGES)})"
            + (f"; experiments beside it: {', '.join(known)}" if known else "; run a stage first")
        )
    models, protocol, split = {}, "", None
    for row, (stage, model) in ROWS.items():
        evaluation = stages[stage].evaluation if stage in stages else {}
        if model in evaluation.get("models", {}):
            protocol, split = evaluation["protocol"], evaluation["split"]
            models[row] = evaluation["models"][model]
    return Result(experiment=experiment, stages=stages, protocol=protocol, split=split, models=models)


def mean_and_spread(results: Sequence[Result], row: str, metric: str) -> tuple[float, float] | None:
    """Mean over the experiments that have the number, and sample standard deviation (0 for one)."""
    values = [r.models[row][metric] for r in results if metric in r.models.get(row, {})]
    if not values:
        return None
    return fmean(values), stdev(values) if len(values) > 1 else 0.0


def judged_rows(results: Sequence[Result]) -> list[str]:
    return [row for row in ROWS if any(row in r.models for r in results)]


def table(results: Sequence[Result]) -> str:
    """Accuracies in percent on the test set, one line a model, mean ± standard deviation over experiments."""
    rows = judged_rows(results)
    lines = [f"{'':18s}" + "".join(f"{m:>15s}" for m in METRICS)]
    for row in rows:
        cells = [mean_and_spread(results, row, m) for m in METRICS]
        lines.append(f"{row:18s}" + "".join(f"{_cell(c, len(results) == 1):>15s}" for c in cells))
    samples = next(r.models[rows[0]]["samples"] for r in results if rows[0] in r.models) if rows else 0
    protocol = results[0].protocol.rsplit("; seed", 1)[0]
    lines.append(f"{len(results)} seed{'s' if len(results) > 1 else ''}; {samples} test images; {protocol}")
    return "\n".join(lines)


def _cell(value: tuple[float, float] | None, alone: bool) -> str:
    if value is None:
        return "-"
    mean, spread = value
    return f"{mean:.2f}" if alone else f"{mean:.2f} ±{spread:4.1f}"


def _read_stage(folder: Path) -> StageRun:
    config, environment = folder / "config.yaml", _json(folder / "environment.json")
    return StageRun(
        folder=folder,
        rows=_lines(folder / "metrics.jsonl"),
        config=yaml.safe_load(config.read_text()) if config.is_file() else {},
        environment=environment,
        status=_json(folder / "status.json"),
        plan=_plan(folder, environment.get("config_sha256")),
        incidents=_lines(folder / "incidents.jsonl"),
        evaluation=_json(folder / "evaluation.json"),
        card=_json(folder / "export" / "model.json"),
    )


def _plan(folder: Path, config_sha256: str | None) -> dict[str, Any]:
    """What was planned for this stage, unless with another config than it ran with."""
    stages = _json(folder.parent / "plan.json").get("stages", [])
    mine = (s for s in stages if s["stage"] == folder.name and s.get("config_sha256") == config_sha256)
    return next(mine, {})


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def _lines(path: Path) -> list[dict[str, Any]]:
    """Complete lines: a run that is being written may end in half of one."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
