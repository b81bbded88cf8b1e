"""One self-contained page for one or more experiments: how good, how it went, where it came from. No network needed."""

import base64
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, Template, select_autoescape

from pipeline.observe.planned import compare
from pipeline.observe.results import METRICS, ROWS, mean_and_spread, read_result

STAGES = {"arm": "Stage 1: ARM pretraining", "distill": "Stage 2: supervised", "semi": "Stage 3: semi-supervised"}
# (stage, title, names of the lines in metrics.jsonl, axis)
CURVES = (
    ("arm", "Loss", {"train/loss": "training", "val/loss": "validation"}, "squared error"),
    ("distill", "Loss", {"train/loss": "training"}, "cross-entropy"),
    ("distill", "Accuracy", {"train/top1": "training", "val/top1": "validation"}, "percent"),
    ("semi", "Loss", {"train/supervised": "labelled", "train/consistency": "accepted pseudo-labels"}, "cross-entropy"),
    ("semi", "Accuracy on validation", {"val/top1": "student", "val/teacher_top1": "teacher"}, "percent"),
    ("semi", "Pseudo-labels", {"ssl/mask_rate": "accepted", "ssl/confidence": "mean confidence"}, "share"),
    ("semi", "Decay of the teacher", {"ema/alpha": "alpha", "ema/guard_hit": "guard active"}, "per step"),
    ("semi", "Energy V = |s - t|² / 2", {"ema/V": "V"}, "squared weights"),
)
# After Okabe and Ito, told apart by colour-blind readers, at a lightness that suits both pages; text takes the page's colour.
COLOURS = ("#1E88D2", "#E2741A", "#0FA37F", "#CC79A7")
_TEXT = "#123456"


def write_report(experiments: Sequence[Path], path: Path) -> Path:
    """Write the page for `experiments` (folders of runs, seeds of one design) and return where it is."""
    results = [read_result(e) for e in experiments]
    judged = [row for row in ROWS if any(row in r.models for r in results)]
    rows = [(row, [mean_and_spread(results, row, m) for m in METRICS]) for row in judged]
    first = results[0].models[judged[-1]] if judged else {}
    page = _template().render(
        title=path.parent.name,
        metrics=METRICS,
        rows=rows,
        seeds=len(results),
        protocols=list(dict.fromkeys(r.protocol.rsplit("; seed", 1)[0] for r in results)),
        splits=[(r.split or "none")[:12] for r in results],
        samples=first.get("samples", 0),
        groups=first.get("groups", {}),
        per_class=[
            (name, [r.models[row]["per_class"][name] for r in results for row in judged if row in r.models])
            for name in first.get("per_class", {})
        ],
        columns=[
            f"{row}, {r.experiment.name}" if len(results) > 1 else row
            for r in results
            for row in judged
            if row in r.models
        ],
        stages=[
            (title, [svg for curve in CURVES if curve[0] == stage and (svg := _figure(experiments, *curve))])
            for stage, title in STAGES.items()
        ],
        reconstructions=[
            (e.name, _picture(p)) for e in experiments if (p := e / "arm" / "report" / "reconstructions.png").is_file()
        ],
        plans=[(e.name, compared) for e in experiments if (compared := compare(e))],
        lineage=[
            (e.name, [_card(e, stage) for stage in STAGES if (e / stage / "export" / "model.json").is_file()])
            for e in experiments
        ],
        environment=_json(
            experiments[0] / next(s for s in STAGES if (experiments[0] / s).is_dir()) / "environment.json"
        ),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page)
    return path


def _template() -> Template:
    folder = Path(__file__).parent
    return Environment(
        loader=FileSystemLoader(folder), autoescape=select_autoescape(["html"]), trim_blocks=True
    ).get_template("report.html")


def _figure(experiments: Sequence[Path], stage: str, title: str, names: dict[str, str], axis: str) -> str:
    """An inline SVG with one line a quantity and experiment, or nothing if there are no numbers."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    curves = [_curves(e / stage / "metrics.jsonl", names) for e in experiments]
    if not any(curves):
        return ""
    style: dict[Any, Any] = {"svg.fonttype": "none", "font.size": 9, "svg.hashsalt": title}
    style |= dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _TEXT)
    with rc_context(style):
        figure = Figure(figsize=(4.6, 2.6), layout="constrained")
        axes = figure.subplots()
        for of_experiment in curves:
            for i, name in enumerate(names):
                steps, values = of_experiment.get(name, ([], []))
                label = names[name] if of_experiment is curves[0] else None
                axes.plot(
                    steps,
                    values,
                    color=COLOURS[i],
                    linestyle=("-", "--")[i % 2],
                    marker="o" if len(steps) == 1 else "",
                    linewidth=1.4,
                    alpha=0.8,
                    label=label,
                )
        axes.set(title=title, xlabel="optimizer step", ylabel=axis)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if len(names) > 1:
            axes.legend(frameon=False, fontsize=8)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :].replace(_TEXT, "currentColor")
    # Ids of several figures share one page.
    return re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{stage}-{re.sub(r'[^a-z]', '', title.lower())}-", svg)


def _curves(path: Path, names: dict[str, str]) -> dict[str, tuple[list[int], list[float]]]:
    found: dict[str, tuple[list[int], list[float]]] = {}
    if path.is_file():
        for line in path.read_text().splitlines():
            row = json.loads(line)
            for name in names:
                if name in row:
                    steps, values = found.setdefault(name, ([], []))
                    steps.append(row["step"])
                    values.append(row[name])
    return found


def _picture(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def _card(experiment: Path, stage: str) -> dict[str, Any]:
    card = _json(experiment / stage / "export" / "model.json")
    command = _json(experiment / stage / "environment.json")["command"]
    return {"title": STAGES[stage], "command": command, **card}


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())
