"""How it went and where it came from: curves, speed, plan against actual, incidents, lineage."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from pipeline.config import flatten
from pipeline.report.figures import Figure, draw, lines
from pipeline.report.results import STAGES, Result, StageRun
from pipeline.report.tables import Table


class Curve(NamedTuple):
    """`names`: lines of metrics.jsonl -> what a reader calls them; those that were not logged are left out."""

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
    Curve("arm", "probes", "Features, judged by labels that training never sees",
          {"val/linear": "linear probe", "val/knn": "nearest neighbours"}, "percent"),
    Curve("distill", "loss", "Loss", {"train/loss": "training"}, "cross-entropy"),
    Curve("distill", "accuracy", "Accuracy", {"train/top1": "training", "val/top1": "validation"}, "percent"),
    Curve("distill", "groups", "Validation by group", {k.format(""): v for k, v in _GROUPS.items()}, "percent"),
    Curve("semi", "loss", "Loss",
          {"train/supervised": "labelled", "train/consistency": "accepted pseudo-labels"}, "cross-entropy"),
    Curve("semi", "accuracy", "Accuracy on validation", {"val/top1": "student", "val/teacher_top1": "teacher"}, "percent"),
    Curve("semi", "groups", "Teacher on validation, by group",
          {k.format("teacher_"): v for k, v in _GROUPS.items()}, "percent"),
    Curve("semi", "pseudo", "Pseudo-labels", {"ssl/mask_rate": "accepted", "ssl/confidence": "mean confidence"}, "share"),
    Curve("semi", "truth", "Pseudo-labels against the truth that no loss sees",
          {"pseudo/precision": "precision", "pseudo/coverage": "coverage"}, "percent",
          "Precision: of those that count, the right ones. Coverage: of the images, those that count."),
    Curve("semi", "precision", "Precision of pseudo-labels, by group",
          {f"pseudo/precision_{g}": g for g in ("head", "medium", "tail")}, "percent", "How far a name can be trusted."),
    Curve("semi", "coverage", "Coverage of pseudo-labels, by group",
          {f"pseudo/coverage_{g}": g for g in ("head", "medium", "tail")}, "percent"),
    Curve("semi", "energy", "Energy V = |s - t|² / 2", {"ema/V": "V"}, "squared weights", logy=True),
    Curve("semi", "decay", "The teacher's decay", {"ema/alpha": "α", "ema/guard_hit": "guard hits"}, "α; share of steps"),
)  # fmt: skip
# What every stage logs of its engine.
ENGINE = tuple(
    Curve(stage, name, title, names, axis)
    for stage in STAGES
    for name, title, names, axis in (
        ("rate", "Learning rate", {"train/lr": "learning rate"}, "per step"),
        ("gradient", "Gradient norm before clipping", {"train/grad_norm": "norm"}, "norm"),
        ("speed", "Throughput", {"perf/images_per_second": "images per second"}, "images per second"),
    )
)

# Key of a stage's plan -> how a reader calls it, and by what it is multiplied.
PLANNED = {
    "steps": ("steps", 1.0),
    "samples": ("images of the first stream", 1.0),
    "memory_gib": ("memory, GiB", 1.0),
    "checkpoint_bytes": ("checkpoint, MB", 1e-6),
    "flops_per_step": ("GFLOPs a step", 1e-9),
    "step_seconds": ("ms a step", 1e3),
    "hours": ("minutes in steps", 60.0),
}


def curves(results: Sequence[Result], stage: str, wanted: Sequence[Curve], folder: Path) -> list[Figure]:
    """Those of `wanted` that one stage has logged, over all experiments of a design."""
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
    header = ["", "state", "steps", "in steps", "images/s", "ms/step", "data wait, %", "GiB", "MFU, %",
              "procs × threads"]  # fmt: skip
    note = "Medians over the logged intervals; memory is the largest logged of rank 0; evaluations and saves are not in the time."
    return Table(name="speed", title="Time and throughput", header=header, rows=rows, note=note)


def plans(results: Sequence[Result]) -> list[Table]:
    """What `plan.json` foretold beside what came, for the numbers that both know: means over the experiments of a design."""
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
    note = "Means over the experiments that were planned. Memory was planned for tensors; on a CPU the whole process is measured."
    return [Table(name="plan", title="Plan against actual", header=header, rows=rows, note=note)]


def _short(value: float) -> str:
    return f"{value:.0f}" if value == round(value) and abs(value) < 1e12 else f"{value:.4g}"


def _actual(run: StageRun) -> dict[str, float]:
    """Measured values under the names that a plan gives them."""
    found: dict[str, float] = {}
    if run.rows:
        found |= {"steps": run.rows[-1]["step"], "samples": run.rows[-1]["samples"]}
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
    rows = [
        [f"{r.name}, {stage}", str(what.get("step", "–")), str(what.get("reason", "–")), str(what.get("data_step", "–"))]
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
    header = ["", "step", "what", "data step"]
    return [Table(name="incidents", title="Incidents", header=header, rows=rows)] if rows else []


def lineage(result: Result) -> list[dict[str, Any]]:
    """A card a stage that has exported, with the command that made it."""
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
