"""The page's sections on training: curves, speed, the plan compared with the run, incidents, lineage."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from pipeline.identity import flatten
from pipeline.jsonl import newest
from pipeline.report.figures import Figure, draw, lines
from pipeline.report.results import STAGES, Result, StageRun
from pipeline.report.tables import Table


class Curve(NamedTuple):
    """A figure of one stage's log.

    Attributes:
        stage: Name of the stage.
        name: Stem of the figure's files, behind the stage.
        title: Heading.
        names: Names in metrics.jsonl -> labels; names that were not logged are left out.
        axis: Label of the y axis.
        note: Text below the heading.
        logy: Use a logarithmic y axis.
    """

    stage: str
    name: str
    title: str
    names: dict[str, str]
    axis: str
    note: str = ""
    logy: bool = False


_GROUPS = {"val/{}head": "head", "val/{}medium": "medium", "val/{}tail": "tail"}
CURVES = (
    Curve("arm", "loss", "Loss", {"train/loss": "training", "val/loss": "validation"}, "squared error"),
    Curve("arm", "features", "Quality of the features",
          {"val/linear": "linear probe", "val/knn": "nearest neighbours"}, "percent",
          "Accuracy of classifiers on the features, on validation. Training never sees the labels."),
    Curve("distill", "loss", "Loss", {"train/loss": "training"}, "cross-entropy"),
    Curve("distill", "accuracy", "Accuracy", {"train/top1": "training", "val/top1": "validation"}, "percent"),
    Curve("distill", "groups", "Validation accuracy by group", {k.format(""): v for k, v in _GROUPS.items()}, "percent"),
    Curve("semi", "loss", "Loss",
          {"train/supervised": "labelled", "train/consistency": "accepted pseudo-labels"}, "cross-entropy"),
    Curve("semi", "accuracy", "Validation accuracy", {"val/top1": "student", "val/teacher_top1": "teacher"}, "percent"),
    Curve("semi", "groups", "Validation accuracy of the teacher by group",
          {k.format("teacher_"): v for k, v in _GROUPS.items()}, "percent"),
    Curve("semi", "pseudo", "Pseudo-labels", {"ssl/mask_rate": "accepted", "ssl/confidence": "mean confidence"}, "share"),
    Curve("semi", "truth", "Pseudo-labels compared with the true labels",
          {"pseudo/precision": "precision", "pseudo/coverage": "coverage"}, "percent",
          "Precision: share of accepted pseudo-labels that is right. Coverage: share of images whose pseudo-label is accepted. "
          "No loss sees the true labels."),
    Curve("semi", "precision", "Precision of pseudo-labels by group",
          {f"pseudo/precision_{g}": g for g in ("head", "medium", "tail")}, "percent", "Groups go by the pseudo-label."),
    Curve("semi", "coverage", "Coverage of pseudo-labels by group",
          {f"pseudo/coverage_{g}": g for g in ("head", "medium", "tail")}, "percent", "Groups go by the true label."),
    Curve("semi", "energy", "Distance between student and teacher", {"ema/V": "V"}, "V = |s - t|² / 2", logy=True),
    Curve("semi", "decay", "Decay of the teacher",
          {"ema/alpha": "decay α", "ema/guard_hit": "changed by the guard"}, "α; share of steps"),
)  # fmt: skip
# Every stage logs these.
ENGINE = tuple(
    Curve(stage, name, title, names, axis)
    for stage in STAGES
    for name, title, names, axis in (
        ("rate", "Learning rate", {"train/lr": "learning rate"}, "per step"),
        ("gradient", "Gradient norm before clipping", {"train/grad_norm": "norm"}, "norm"),
        ("speed", "Throughput", {"perf/images_per_second": "images per second"}, "images per second"),
    )
)

# Key of a stage's plan -> its label, and the factor to the label's unit.
PLANNED = {
    "steps": ("steps", 1.0),
    "samples": ("images of the first stream", 1.0),
    "memory_gib": ("memory, GiB", 1.0),
    "checkpoint_bytes": ("checkpoint, MB", 1e-6),
    "flops_per_step": ("GFLOPs per step", 1e-9),
    "step_seconds": ("ms per step", 1e3),
    "hours": ("minutes in steps", 60.0),
}


def curves(results: Sequence[Result], stage: str, wanted: Sequence[Curve], folder: Path) -> list[Figure]:
    """Draw the curves of `wanted` that one stage has logged.

    Args:
        results: Experiments of one design; each is a line.
        stage: Name of the stage.
        wanted: Curves of any stage.
        folder: Folder of the figures.
    """
    runs = [r.stages[stage] for r in results if stage in r.stages]
    drawn = []
    for curve in wanted:
        if curve.stage != stage:
            continue
        series = {label: [p for r in runs if (p := r.curve(name))[0]] for name, label in curve.names.items()}
        series = {label: points for label, points in series.items() if points}
        if series:
            paint = lines(series, "optimizer step", curve.axis, logy=curve.logy)
            drawn.append(draw(folder, f"{stage}_{curve.name}", curve.title, paint, note=curve.note))
    return drawn


def speed(results: Sequence[Result]) -> Table:
    """Make the table of time and throughput, one row per stage of each experiment."""
    rows = []
    for result in results:
        for stage, run in result.stages.items():
            world = run.environment.get("world_size", "–")
            threads = run.environment.get("threads", "–")
            rows.append(
                [
                    f"{result.name}, {stage}",
                    str(run.status.get("state", "–")),
                    str(round(run.rows[-1]["step"])) if run.rows else "0",
                    _clock(run.seconds()),
                    _median(run, "perf/images_per_second", "{:.0f}"),
                    _median(run, "perf/step_seconds", "{:.1f}", 1000),
                    _median(run, "perf/data_wait_share", "{:.1f}", 100),
                    _peak(run, "perf/memory_gib"),
                    _median(run, "perf/mfu", "{:.1f}", 100),
                    f"{world} × {threads}",
                ]
            )
    header = ["", "state", "steps", "time", "images/s", "ms/step", "data wait, %", "GiB", "MFU, %",
              "processes × threads"]  # fmt: skip
    note = (
        "Medians over the logged intervals. Memory is the largest that rank 0 logged. The time leaves out evaluations and "
        "saves. MFU: share of the machine's peak FLOP/s that the model uses."
    )
    return Table(name="speed", title="Time and throughput", header=header, rows=rows, note=note)


def plans(results: Sequence[Result]) -> list[Table]:
    """Compare plan.json with the run, for the numbers that both have: means over the experiments of a design."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for result in results:
        for stage, run in result.stages.items():
            actual = _actual(run)
            for key, planned in _numbers(run.plan).items():
                if key in PLANNED and key in actual:
                    found.setdefault((stage, key), []).append((planned, actual[key]))
    if not found:
        return []
    rows = []
    for (stage, key), pairs in found.items():
        words, scale = PLANNED[key]
        planned, measured = (scale * fmean(values) for values in zip(*pairs, strict=True))
        ratio = f"{measured / planned:.2f}" if planned else "–"
        rows.append([f"{stage}: {words}", _short(planned), _short(measured), ratio])
    header = ["", "planned", "actual", "actual / planned"]
    note = (
        "Means over the experiments that have a plan. The plan counts the memory of tensors; on a CPU the whole process is "
        "measured."
    )
    return [Table(name="plan", title="Planned and actual cost", header=header, rows=rows, note=note)]


def _short(value: float) -> str:
    return f"{value:.0f}" if value == round(value) and abs(value) < 1e12 else f"{value:.4g}"


def _actual(run: StageRun) -> dict[str, float]:
    """Return measured values under the names that a plan gives them."""
    found: dict[str, float] = {}
    if run.rows:
        found |= {"steps": run.rows[-1]["step"], "samples": float(newest(run.rows, "samples") or 0)}
        found["memory_gib"] = max(row.get("perf/memory_gib", 0.0) for row in run.rows)
    seconds = run.seconds()
    if seconds:
        found |= {"hours": seconds / 3600, "seconds": seconds, "step_seconds": seconds / max(1, found["steps"])}
        rates = run.curve("perf/tflops")[1]
        if rates:
            found["flops_per_step"] = 1e12 * sum(rates) / len(rates) * found["step_seconds"]
    saved = sorted((run.folder / "checkpoints").glob("step_*"))
    if saved:
        found["checkpoint_bytes"] = sum(f.stat().st_size for f in saved[-1].rglob("*") if f.is_file())
    return found


def _numbers(plan: dict[str, Any]) -> dict[str, float]:
    return {k: float(v) for k, v in flatten(plan).items() if isinstance(v, int | float) and not isinstance(v, bool)}


def incidents(results: Sequence[Result]) -> list[Table]:
    """Make the table of incidents and of stages that are not complete; no table if there are none."""
    rows = [
        [
            f"{r.name}, {stage}",
            str(what.get("step", "–")),
            str(what.get("reason", "–")),
            str(what.get("data_step", "–")),
        ]
        for r in results
        for stage, run in r.stages.items()
        for what in run.incidents
    ]
    rows += [
        [
            f"{r.name}, {stage}",
            str(run.status.get("step", "–")),
            f"{run.status['state']}: {run.status.get('reason', '')}",
            "–",
        ]
        for r in results
        for stage, run in r.stages.items()
        if run.status.get("state") not in (None, "complete")
    ]
    header = ["", "step", "incident", "data step"]
    return [Table(name="incidents", title="Incidents", header=header, rows=rows)] if rows else []


def lineage(result: Result) -> list[dict[str, Any]]:
    """Return the card of each stage that has an export, with the stage's title and command."""
    return [
        {"title": STAGES[stage], "command": run.environment.get("command", "unknown"), **run.card}
        for stage, run in result.stages.items()
        if run.card
    ]


def _median(run: StageRun, name: str, form: str, scale: float = 1.0) -> str:
    values = sorted(run.curve(name)[1])
    return form.format(scale * values[len(values) // 2]) if values else "–"


def _peak(run: StageRun, name: str) -> str:
    values = run.curve(name)[1]
    return f"{max(values):.2f}" if values else "–"


def _clock(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
