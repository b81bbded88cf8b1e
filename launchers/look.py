"""python -m launchers.look report RUNS/EXPERIMENT... [--with FOLDER...] [--out PAGE.html]   what happened, on one page
python -m launchers.look evaluate EXPORT DATA [...] [--nproc N]     python -m pipeline.evaluate in N processes
python -m launchers.look efficiency CONFIG CONFIG... [key=value...]  real stage-3 steps side by side
python -m launchers.look inference MODEL... [--sizes 224 384]        throughput against resolution
python -m launchers.look fields MODEL... --data DATA                 effective receptive fields

A MODEL is a name of ours or timm/NAME; for fields also NAME=EXPORT. The last three write a folder (--out) that --with
takes into a report. Exit codes: those of `python -m stages`.
"""

import argparse
import sys
from pathlib import Path

from pipeline.errors import ConfigError, PipelineError
from pipeline.train.signals import interrupt_on_signals


def main(arguments: list[str]) -> int:
    given, rest = _parser().parse_known_args(arguments)
    interrupt_on_signals()
    try:
        if rest and given.command != "evaluate":
            raise ConfigError(f"unrecognized arguments: {' '.join(rest)}")
        return _run(given, rest)
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m launchers.look", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    page = commands.add_parser("report")
    page.add_argument("experiments", type=Path, nargs="+", metavar="RUNS/EXPERIMENT")
    page.add_argument(
        "--with", type=Path, nargs="+", default=[], dest="extras", metavar="FOLDER", help="measured sections"
    )
    page.add_argument("--out", type=Path, help="default: report.html in the first experiment's folder")
    judge = commands.add_parser("evaluate", add_help=False)
    judge.add_argument("--nproc", type=int, default=1)
    cost = commands.add_parser("efficiency")
    cost.add_argument("words", nargs="+", metavar="CONFIG | key=value")
    cost.add_argument("--steps", type=int, default=30)
    cost.add_argument("--out", type=Path, default=Path("runs/efficiency"))
    speed = commands.add_parser("inference")
    speed.add_argument("models", nargs="+", metavar="MODEL")
    speed.add_argument("--sizes", type=int, nargs="+", default=[224])
    speed.add_argument("--batch", type=int, default=16)
    speed.add_argument("--rounds", type=int, default=5)
    speed.add_argument("--out", type=Path, default=Path("runs/inference"))
    fields = commands.add_parser("fields")
    fields.add_argument("models", nargs="+", metavar="MODEL | NAME=EXPORT")
    fields.add_argument("--data", type=Path, required=True, help="folder with a manifest")
    fields.add_argument("--size", type=int, default=224, help="pixels a side, of models by name")
    fields.add_argument("--images", type=int, default=16)
    fields.add_argument("--out", type=Path, default=Path("runs/fields"))
    return parser


def _run(given: argparse.Namespace, rest: list[str]) -> int:
    if given.command == "evaluate":
        from launchers import local

        if given.nproc < 1:
            raise ConfigError(f"--nproc {given.nproc}: at least one process is needed")
        command = [sys.executable, "-m", "pipeline.evaluate", *rest]
        return local.spawn(command, given.nproc)
    if given.command == "report":
        from launchers import report

        print(f"report: {report.run(given.experiments, given.out, given.extras)}")
        return 0
    from launchers import measure

    if given.command == "efficiency":
        overrides = [word for word in given.words if "=" in word]
        configs = [Path(word) for word in given.words if "=" not in word]
        folder = measure.efficiency(configs, overrides, given.steps, given.out)
    elif given.command == "inference":
        folder = measure.inference(given.models, given.sizes, given.batch, given.rounds, given.out)
    else:
        exports = dict(word.split("=", 1) for word in given.models if "=" in word)
        names = [word for word in given.models if "=" not in word]
        weights = {name: Path(where) for name, where in exports.items()}
        folder = measure.fields(names, given.data, given.size, given.images, weights, given.out)
    for table in sorted((folder / "tables").glob("*.md")):
        print(table.read_text())
    print(f"{folder}: take it into a report with --with {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
