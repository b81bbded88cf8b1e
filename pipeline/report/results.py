"""Read the folders of experiments: evaluations, curves, cards, incidents, plans."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from pipeline.books import DataFindings, Evaluation, Plan, read_book, read_config, read_status
from pipeline.errors import DataError, HandoverError
from pipeline.exports.card import CARD, Card
from pipeline.jsonl import read_object, read_rows

logger = logging.getLogger(__name__)

METRICS = ("top1", "head", "medium", "tail")
STAGES = {"arm": "Stage 1: ARM pretraining", "distill": "Stage 2: supervised", "semi": "Stage 3: semi-supervised"}
DATA_CHECK = "data-check.json"  # what a chain's check of its data found, in the experiment's folder
# Row of the table -> (stage, model in its evaluation.json).
FOLDS = "folds.json"  # result of `python -m studies.folds`, in the experiment's folder
ROWS = {
    "stage 2": ("distill", "student"),
    "stage 3, student": ("semi", "student"),
    "stage 3, teacher": ("semi", "teacher"),
}


@dataclass(frozen=True, kw_only=True)
class StageRun:
    """Contents of one stage's folder; what is not there yet is empty. `rows` are those of metrics.jsonl."""

    folder: Path
    rows: list[dict[str, float]]
    config: dict[str, Any]
    environment: dict[str, Any]
    status: dict[str, Any]
    plan: dict[str, Any]
    incidents: list[dict[str, Any]]
    evaluation: dict[str, Any]
    card: dict[str, Any]

    def curve(self, name: str) -> tuple[list[float], list[float]]:
        """Return the steps at which `name` was logged, and its values."""
        pairs = [(row["step"], row[name]) for row in self.rows if name in row]
        return [step for step, _ in pairs], [value for _, value in pairs]

    def validated(self, model: str) -> float | None:
        """Return the accuracy in percent, a mean over the classes, of a model on the validation images; None without them.

        It is that of the exported state: the best validation by top-1 or the last, by `loop.select`. A later state that is as
        accurate as the one that the stage started from takes its place.
        """
        prefix = "val/" if model == "student" else f"val/{model}_"
        rows = [row for row in self.rows if f"{prefix}balanced" in row]
        if not rows:
            return None
        best = self.config.get("loop", {}).get("select") == "best"
        chosen = max(rows, key=lambda row: (row[f"{prefix}top1"], row["step"] > 0)) if best else rows[-1]
        return chosen[f"{prefix}balanced"]

    def seconds(self) -> float:
        """Return the seconds spent in training steps, from their logged means, without evaluations and saves."""
        total, before = 0.0, 0.0
        for row in self.rows:
            if "perf/step_seconds" in row:
                total += (row["step"] - before) * row["perf/step_seconds"]
                before = row["step"]
        return total


@dataclass(frozen=True, kw_only=True)
class Result:
    """One experiment.

    Attributes:
        experiment: Its folder.
        stages: Name of a stage -> its folder's contents.
        protocol: Description of the split.
        split: Hash of the split, if there is one.
        models: Row of the table (a key of `ROWS`) -> metrics of that model.
        data_findings: What the chain's check of its data found, the gravest first: name, level, title, text, count.
    """

    experiment: Path
    stages: dict[str, StageRun]
    protocol: str
    split: str | None
    models: dict[str, dict[str, Any]]
    data_findings: list[dict[str, Any]]

    @property
    def name(self) -> str:
        """Name of the experiment's folder."""
        return self.experiment.name

    def seed(self, stage: str) -> int:
        """Return the `run.seed` of a stage."""
        return int(self.stages[stage].config.get("run", {}).get("seed", 0))

    def label_notes(self) -> list[str]:
        """Return sentences on the labels (learnt, held out or missing), on what is absent without them, and on folds."""
        notes = _fold_notes(self.experiment / FOLDS)
        found = [s.evaluation for s in self.stages.values() if s.evaluation.get("labels")]
        if not found:
            return notes
        labels, notes = found[-1]["labels"], [found[-1].get("labels_in_words", ""), *notes]
        if "semi" in self.stages and labels.get("without_label") and not labels.get("hidden"):
            notes.append(
                "precision and coverage of the pseudo-labels are absent: no unlabelled image has a label to compare with"
            )
        return notes

    def labelled_per_class(self) -> dict[str, int]:
        """Return the labelled images of each class in the last stage that was evaluated."""
        found = [s.evaluation.get("labelled_per_class", {}) for s in self.stages.values()]
        return next((counts for counts in reversed(found) if counts), {})


def _fold_notes(path: Path) -> list[str]:
    sentence = read_object(path).get("sentence", "")
    if isinstance(sentence, str) and (sentence or not path.exists()):
        return [sentence] if sentence else []
    return [f"{path.name} is damaged; `python -m studies.folds` writes it again"]


def read_result(experiment: Path) -> Result:
    """Read what the stages of an experiment have written so far.

    Raises:
        DataError: If the folder holds no stage.
    """
    stages = {stage: _read_stage(experiment / stage) for stage in STAGES if (experiment / stage).is_dir()}
    if not stages:
        known = [p.name for p in sorted(experiment.parent.glob("*")) if any((p / stage).is_dir() for stage in STAGES)]
        raise DataError(
            f"{experiment} holds no stage ({', '.join(STAGES)})"
            + (f"; experiments beside it: {', '.join(known)}" if known else "; train a stage first")
        )
    models, protocol, split = {}, "", None
    for row, (stage, model) in ROWS.items():
        evaluation = stages[stage].evaluation if stage in stages else {}
        if model in evaluation.get("models", {}):
            protocol, split = evaluation.get("protocol", ""), evaluation.get("split")
            models[row] = evaluation["models"][model]
    return Result(
        experiment=experiment,
        stages=stages,
        protocol=protocol,
        split=split,
        models=models,
        data_findings=read_book(experiment / DATA_CHECK, DataFindings).get("findings", []),
    )


def mean_and_spread(results: Sequence[Result], row: str, metric: str) -> tuple[float, float] | None:
    """Return mean and sample standard deviation (0 for one value) over the experiments that have the metric."""
    values = [r.models[row][metric] for r in results if r.models.get(row, {}).get(metric) is not None]
    if not values:
        return None
    return fmean(values), stdev(values) if len(values) > 1 else 0.0


def evaluated_rows(results: Sequence[Result]) -> list[str]:
    """Return the rows of the table that at least one experiment has evaluated."""
    return [row for row in ROWS if any(row in r.models for r in results)]


def table(results: Sequence[Result]) -> str:
    """Format accuracies in percent on the test set, one line per model: mean ± standard deviation over experiments."""
    rows = evaluated_rows(results)
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
    environment = read_object(folder / "environment.json")
    return StageRun(
        folder=folder,
        rows=read_rows(folder / "metrics.jsonl", "step"),
        config=read_config(folder),
        environment=environment,
        status=read_status(folder),
        plan=_plan(folder, environment.get("config_sha256")),
        incidents=read_rows(folder / "incidents.jsonl"),
        evaluation=read_book(folder / "evaluation.json", Evaluation),
        card=_card(folder / "export"),
    )


def _card(export: Path) -> dict[str, Any]:
    """Return the values of an export's card; empty if there is none or a damaged one."""
    if not (export / CARD).exists():
        return {}
    try:
        return Card.read(export).model_dump(mode="json")
    except HandoverError as error:
        logger.warning("%s", error)
        return {}


def _plan(folder: Path, config_sha256: str | None) -> dict[str, Any]:
    """Return this stage's plan, unless it was made for another config than the stage ran with."""
    stages = read_book(folder.parent / "plan.json", Plan).get("stages", [])
    mine = (s for s in stages if s["stage"] == folder.name and s.get("config_sha256") == config_sha256)
    return next(mine, {})
