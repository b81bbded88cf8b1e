"""python -m launchers local STAGE CONFIG [key=value ...] [--nproc N]   one stage in N processes on this machine
python -m launchers demo [--seeds 0 1 2] [--nproc N]                  the three stages on the bundled digits, and a report
python -m launchers report RUNS/EXPERIMENT... [--out PAGE.html]       what happened and how good it is, on one page
python -m launchers evaluate EXPORT DATA [...] [--nproc N]            python -m pipeline.evaluate in N processes

Config and parents are checked once, before any process starts. Exit codes: those of `python -m stages`, relayed from
the first rank that failed.
"""

import argparse
import sys
from pathlib import Path

from launchers import demo, local, report
from pipeline.errors import PipelineError
from pipeline.train.signals import interrupt_on_signals


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m launchers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("local", help="one stage on this machine")
    one.add_argument("stage", metavar="STAGE")
    one.add_argument("config", type=Path, metavar="CONFIG")
    one.add_argument("overrides", nargs="*", metavar="key=value")
    one.add_argument("--nproc", type=int, default=1)
    chain = commands.add_parser("demo", help="the three stages on the bundled digits")
    chain.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    chain.add_argument("--nproc", type=int, default=2)
    page = commands.add_parser("report", help="what happened and how good it is, on one page")
    page.add_argument("experiments", type=Path, nargs="+", metavar="RUNS/EXPERIMENT")
    page.add_argument("--out", type=Path, help="default: report.html in the first experiment's folder")
    judge = commands.add_parser("evaluate", help="python -m pipeline.evaluate in N processes", add_help=False)
    judge.add_argument("--nproc", type=int, default=1)
    given, rest = parser.parse_known_args(arguments)
    if rest and given.command != "evaluate":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if given.command != "report" and given.nproc < 1:
        parser.error(f"--nproc {given.nproc}: at least one process is needed")
    interrupt_on_signals()
    try:
        if given.command == "demo":
            return demo.run(given.seeds, given.nproc)
        if given.command == "report":
            print(f"report: {report.run(given.experiments, given.out)}")
            return 0
        if given.command == "evaluate":
            return local.spawn([sys.executable, "-m", "pipeline.evaluate", *rest], given.nproc)
        return local.run_stage(given.stage, given.config, given.overrides, given.nproc)
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
