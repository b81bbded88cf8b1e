"""python -m launchers local STAGE CONFIG [key=value ...] [--nproc N]   one stage in N processes on this machine
python -m launchers local chain NAME [key=value ...] [--nproc N]      a plan, configs/STAGE/NAME.yaml stage after stage, a report
python -m launchers slurm STAGE CONFIG [key=value ...] [--cluster FILE]   one stage as a job of SLURM
python -m launchers slurm chain NAME [key=value ...] [--sweep key=a,b]   configs/STAGE/NAME.yaml, stage after stage
python -m launchers plan STAGE|chain CONFIG|NAME [key=value ...] [--cluster FILE]   what it will need, and the exact scripts
python -m launchers doctor STAGE|chain CONFIG|NAME [key=value ...] [--cluster FILE]   whether this machine and cluster can run it
python -m launchers status [EXPERIMENT ...] [--root runs]             where every stage stands
python -m launchers demo [--seeds 0 1 2] [--nproc N]                  the three stages on the bundled digits, and a report
python -m launchers report RUNS/EXPERIMENT... [--with FOLDER...]      what happened and how good it is, on one page
python -m launchers evaluate EXPORT DATA [...] [--nproc N]            python -m pipeline.evaluate in N processes
python -m launchers efficiency CONFIG CONFIG... [key=value ...]       real stage-3 steps side by side
python -m launchers inference MODEL... [--sizes 224 384]              throughput against resolution
python -m launchers pareto                                            measured speed against reported accuracy
python -m launchers fields MODEL... --data DATA                       effective receptive fields

`arm:key=value` overrides in that stage only; with --cluster, `cluster:key=value` in the cluster's preset. Config and parents
are checked once, before any process starts or job is submitted. Exit codes: those of `python -m stages`; `local` relays
that of the first rank that failed.
"""

import argparse
import sys
from pathlib import Path

from launchers import reports
from pipeline.errors import PipelineError
from pipeline.train.signals import interrupt_on_signals

CLUSTER = Path("configs/cluster/cpu.yaml")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m launchers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("local", help="a stage, or the chain, on this machine")
    one.add_argument("stage", metavar="STAGE", help="arm | distill | semi | chain")
    one.add_argument("config", metavar="CONFIG", help="a file; for the chain a name: configs/STAGE/NAME.yaml")
    one.add_argument("overrides", nargs="*", metavar="key=value")
    one.add_argument("--nproc", type=int, default=1)
    one.set_defaults(run=_local)
    chain = commands.add_parser("demo", help="the three stages on the bundled digits")
    chain.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    chain.add_argument("--nproc", type=int, default=2)
    chain.set_defaults(run=_demo)
    jobs = commands.add_parser("slurm", help="a stage, or the chain, as jobs of SLURM")
    jobs.add_argument("stage", metavar="STAGE", help="arm | distill | semi | chain")
    jobs.add_argument("config", metavar="CONFIG", help="a file; for the chain a name: configs/STAGE/NAME.yaml")
    jobs.add_argument("overrides", nargs="*", metavar="key=value")
    jobs.add_argument("--cluster", type=Path, default=CLUSTER, metavar="FILE")
    jobs.add_argument("--sweep", action="append", default=[], metavar="key=a,b", help="a grid; may be given again")
    jobs.set_defaults(run=_slurm)
    for name, run, what in (
        ("plan", _plan, "what it will need, before it costs anything"),
        ("doctor", _doctor, "whether it can run here"),
    ):
        ahead = commands.add_parser(name, help=what)
        ahead.add_argument("stage", metavar="STAGE", help="arm | distill | semi | chain")
        ahead.add_argument("config", metavar="CONFIG", help="a file; for the chain a name")
        ahead.add_argument("overrides", nargs="*", metavar="key=value")
        ahead.add_argument("--cluster", type=Path, default=CLUSTER, metavar="FILE")
        ahead.set_defaults(run=run)
    where = commands.add_parser("status", help="where every stage of an experiment stands")
    where.add_argument("experiments", nargs="*", metavar="EXPERIMENT", help="all, if none is given")
    where.add_argument("--root", type=Path, default=Path("runs"))
    where.set_defaults(run=_status)
    reports.add_commands(commands)
    given, more = parser.parse_known_args(arguments)
    # key=value may stand behind an option too, which argparse does not allow; launchers/reports.py passes everything on.
    overrides = hasattr(given, "overrides") and all("=" in word and not word.startswith("-") for word in more)
    if more and not overrides and given.command not in reports.COMMANDS:
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    if overrides:
        given.overrides = [*given.overrides, *more]
    given.rest = more
    if getattr(given, "nproc", 1) < 1:
        parser.error(f"--nproc {given.nproc}: at least one process is needed")
    interrupt_on_signals()
    try:
        return given.run(given)
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _local(given: argparse.Namespace) -> int:
    from launchers import chain, local

    steps = chain.read_steps(given.stage, given.config, given.overrides)
    if given.stage != chain.CHAIN:
        return local.run(steps, given.nproc)
    from launchers.plan import planner
    from pipeline.report import experiment as report

    planner.before(steps, given.nproc)
    code = local.run(steps, given.nproc)
    if code == 0:
        print(f"report: {report.run([steps[0].folder.parent], None)}")
    return code


def _demo(given: argparse.Namespace) -> int:
    from launchers import demo

    return demo.run(given.seeds, given.nproc)


def _slurm(given: argparse.Namespace) -> int:
    from launchers import chain, slurm

    cluster, overrides = chain.read_cluster(given.cluster, given.overrides)
    points = chain.read_points(given.stage, given.config, overrides, given.sweep)
    name = chain.read_steps(given.stage, given.config, overrides)[0].folder.parent
    jobs = slurm.run(points, cluster, name.with_name(f"{name.name}-sweep") if given.sweep else name)
    for job in jobs:
        print(f"{job.experiment} {job.stage}: job {job.job_id} {job.state}")
    if not jobs:
        print("nothing to submit: all is complete")
    return 0


def _plan(given: argparse.Namespace) -> int:
    from launchers import chain
    from launchers.plan import planner

    cluster, overrides = chain.read_cluster(given.cluster, given.overrides)
    return planner.run(chain.read_steps(given.stage, given.config, overrides), cluster)


def _doctor(given: argparse.Namespace) -> int:
    from launchers import chain, doctor

    cluster, overrides = chain.read_cluster(given.cluster, given.overrides)
    return doctor.run(chain.read_steps(given.stage, given.config, overrides), cluster)


def _status(given: argparse.Namespace) -> int:
    from launchers import status

    return status.show(given.root, given.experiments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
