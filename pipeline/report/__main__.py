"""Write the report of one or more experiments: python -m pipeline.report RUNS/EXPERIMENT... [--with FOLDER...]."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.cli import guarded


def main(arguments: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    return guarded(_run, arguments)


def _run(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.report",
        description="Write one HTML page: how accurate the models are, how training went, and where the weights came from.",
    )
    parser.add_argument("experiments", type=Path, nargs="+", metavar="RUNS/EXPERIMENT", help="folders of experiments")
    parser.add_argument(
        "--with",
        type=Path,
        nargs="+",
        default=[],
        dest="sections",
        metavar="FOLDER",
        help="folders written by efficiency, inference, pareto or fields: each becomes a section of the page",
    )
    parser.add_argument("--out", type=Path, help="the page (default: report.html in the first experiment's folder)")
    given = parser.parse_args(arguments)
    from pipeline.report import experiment

    print(f"report: {experiment.run(given.experiments, given.out, given.sections)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
