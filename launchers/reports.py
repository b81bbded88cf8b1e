"""The commands that look at what was made: report, evaluate, efficiency, inference, front, fields (listed in `__main__.py`).

A MODEL is a name of ours or timm/NAME; for fields also NAME=EXPORT. The last four write a folder (--out) that --with
takes into a report.
"""

import argparse
import sys
from pathlib import Path
from typing import Any


def add_commands(commands: Any) -> None:
    """Each with `run`, a function of what was given, as the others of `python -m launchers`."""
    page = commands.add_parser("report", help="what happened and how good it is, on one page")
    page.add_argument("experiments", type=Path, nargs="+", metavar="RUNS/EXPERIMENT")
    page.add_argument(
        "--with", type=Path, nargs="+", default=[], dest="extras", metavar="FOLDER", help="measured sections"
    )
    page.add_argument("--out", type=Path, help="default: report.html in the first experiment's folder")
    page.set_defaults(run=_report)
    judge = commands.add_parser("evaluate", help="python -m pipeline.evaluate in N processes", add_help=False)
    judge.add_argument("--nproc", type=int, default=1)
    judge.set_defaults(run=_evaluate)
    cost = commands.add_parser("efficiency", help="real stage-3 steps side by side")
    cost.add_argument("configs", type=Path, nargs="+", metavar="CONFIG")
    cost.add_argument("--steps", type=int, default=30)
    cost.add_argument("--out", type=Path, default=Path("runs/efficiency"))
    cost.set_defaults(run=_efficiency, overrides=[])
    speed = commands.add_parser("inference", help="throughput against resolution")
    speed.add_argument("models", nargs="*", metavar="MODEL", help="default: those of EfficientViM's Table E")
    speed.add_argument("--sizes", type=int, nargs="+", default=[224])
    speed.add_argument("--batch", type=int, default=16)
    speed.add_argument("--rounds", type=int, default=5)
    speed.add_argument("--deployed", action="store_true", help="batch norms and branches folded, as models are shipped")
    speed.add_argument("--out", type=Path, default=Path("runs/inference"))
    speed.set_defaults(run=_inference)
    front = commands.add_parser("front", help="speed here against accuracy as reported")
    front.add_argument("--rows", nargs="+", default=[], metavar="ROW", help="some of them; default: all")
    front.add_argument("--batch", type=int, default=16)
    front.add_argument("--rounds", type=int, default=5)
    front.add_argument("--out", type=Path, default=Path("runs/front"))
    front.set_defaults(run=_front)
    fields = commands.add_parser("fields", help="effective receptive fields")
    fields.add_argument("models", nargs="+", metavar="MODEL | NAME=EXPORT")
    fields.add_argument("--data", type=Path, required=True, help="folder with a manifest")
    fields.add_argument("--size", type=int, default=224, help="pixels a side, of models by name")
    fields.add_argument("--images", type=int, default=16)
    fields.add_argument("--out", type=Path, default=Path("runs/fields"))
    fields.set_defaults(run=_fields)


def _report(given: argparse.Namespace) -> int:
    from pipeline.report import experiment as report

    print(f"report: {report.run(given.experiments, given.out, given.extras)}")
    return 0


def _evaluate(given: argparse.Namespace) -> int:
    from launchers import local

    return local.spawn([sys.executable, "-m", "pipeline.evaluate", *given.rest], given.nproc)


def _efficiency(given: argparse.Namespace) -> int:
    from benchmarks import measure

    overrides = [*given.overrides, *(str(word) for word in given.configs if "=" in str(word))]
    configs = [path for path in given.configs if "=" not in str(path)]
    return _show(measure.efficiency(configs, overrides, given.steps, given.out))


def _inference(given: argparse.Namespace) -> int:
    from benchmarks import inference

    return _show(
        inference.run(given.models, given.sizes, given.batch, given.rounds, given.out, deployed=given.deployed)
    )


def _front(given: argparse.Namespace) -> int:
    from benchmarks import pareto as front

    return _show(front.run(given.rows, given.batch, given.rounds, given.out))


def _fields(given: argparse.Namespace) -> int:
    from benchmarks import measure

    weights = {name: Path(folder) for name, _, folder in (word.partition("=") for word in given.models) if folder}
    names = [word for word in given.models if "=" not in word]
    return _show(measure.fields(names, given.data, given.size, given.images, weights, given.out))


def _show(folder: Path) -> int:
    for table in sorted((folder / "tables").glob("*.md")):
        print(table.read_text())
    print(f"{folder}: take it into a report with --with {folder}")
    return 0
