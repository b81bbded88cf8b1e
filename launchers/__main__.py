"""Start stages on this machine or on SLURM, plan them, and follow them.

python -m launchers local STAGE CONFIG [key=value ...] [--nproc N]   one stage in N processes on this machine
python -m launchers local chain NAME [key=value ...] [--nproc N]      a plan, configs/STAGE/NAME.yaml of every stage, a report
python -m launchers recipe NAME --train DIR... [--split FILE] [--budget 30m]   look at images, write configs/STAGE/NAME.yaml
python -m launchers slurm STAGE CONFIG [key=value ...] [--cluster FILE]   one stage as a job of SLURM
python -m launchers slurm chain NAME [key=value ...] [--sweep key=a,b]   configs/STAGE/NAME.yaml of every stage
python -m launchers sweep STAGE|chain CONFIG|NAME [key=value ...] --over key=values ... [--trials N]   search values
python -m launchers plan STAGE|chain CONFIG|NAME [key=value ...] [--cluster FILE]   what it will need, and the scripts
python -m launchers simulate STAGE|chain CONFIG|NAME [key=value ...] [--ranks 512]   what 8 to 512 ranks would open and read
python -m launchers doctor STAGE|chain CONFIG|NAME [key=value ...] [--cluster FILE]   whether it can run here
python -m launchers status [EXPERIMENT ...] [--root runs]             how far every stage is
python -m launchers demo [--seeds 0 1 2] [--nproc N]                  all stages on bundled digits, and a report
python -m launchers report RUNS/EXPERIMENT... [--with FOLDER...]      one page: what happened and how good the models are
python -m launchers evaluate EXPORT DATA [...] [--nproc N]            python -m pipeline.evaluate in N processes
python -m launchers efficiency CONFIG CONFIG... [key=value ...]       time real steps of stage 3 side by side
python -m launchers inference MODEL... [--sizes 224 384]              throughput against resolution
python -m launchers pareto                                            speed measured here against reported accuracy
python -m launchers fields MODEL... --data DATA                       effective receptive fields

`arm:key=value` overrides a key in that stage only; with --cluster, `cluster:key=value` overrides one of the cluster's
preset. Configs and parents are checked once, before any process starts or any job is submitted. The exit codes are those
of `python -m stages`; `local` ends with the code of the rank that failed.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from launchers import reports
from launchers.recipe.networks import FAMILIES
from launchers.sweep.space import SAMPLERS
from pipeline.cli import guarded
from pipeline.config import find_config
from pipeline.errors import ConfigError
from pipeline.train.signals import interrupt_on_signals
from stages import SPECS

PRESET = Path("configs/cluster/cpu.yaml")


def main(arguments: list[str]) -> int:
    """Run the command and return its exit code."""
    return guarded(_run, arguments)


def _run(arguments: list[str]) -> int:
    parser = _parser()
    given, more = parser.parse_known_args(arguments)
    # argparse does not accept key=value after an option; the commands of `reports` parse their words themselves.
    overrides = hasattr(given, "overrides") and all("=" in word and not word.startswith("-") for word in more)
    if more and not overrides and given.command not in reports.COMMANDS:
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    if overrides:
        given.overrides = [*given.overrides, *more]
    given.rest = more
    if getattr(given, "nproc", 1) < 1:
        parser.error(f"--nproc {given.nproc}: at least one process is needed")
    interrupt_on_signals()
    code: int = given.run(given)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m launchers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        added: argparse.ArgumentParser = commands.add_parser(name, help=text)
        added.set_defaults(run=run)
        return added

    def steps(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        added = command(name, run, text)
        added.add_argument("stage", metavar="STAGE", help=" | ".join([*SPECS, "chain"]))
        added.add_argument("config", metavar="CONFIG", help="a file; for the chain a name: configs/STAGE/NAME.yaml")
        added.add_argument("overrides", nargs="*", metavar="key=value")
        return added

    local = steps("local", _local, "a stage, or the chain, on this machine")
    local.add_argument("--nproc", type=int, default=1)
    local.add_argument("--no-report", action="store_true", help="write no report after a chain")
    local.add_argument("--budget", help="time for a chain whose configs are still to be written, such as 30m or 2h")
    sweep = steps("sweep", _sweep, "search the values of keys; trials are compared by their best validation")
    sweep.add_argument(
        "--over",
        action="append",
        default=[],
        metavar="key=values",
        help="a list a,b,c or a range LOW..HIGH, with :log on a logarithmic scale; may be repeated",
    )
    sweep.add_argument("--trials", type=int, default=20, help="number of trials (default 20)")
    sweep.add_argument("--jobs", type=int, default=1, help="trials at the same time on this machine (default 1)")
    sweep.add_argument("--nproc", type=int, default=1, help="processes of each stage (default 1)")
    sweep.add_argument("--sampler", choices=SAMPLERS, default="tpe")
    sweep.add_argument("--seed", type=int, default=0, help="of the sampler (default 0)")
    sweep.add_argument("--cluster", type=Path, metavar="FILE", help="preset: submit a round of trials to SLURM")
    for name, run, text in (
        ("slurm", _slurm, "a stage, or the chain, as jobs of SLURM"),
        ("plan", _plan, "what it will need, before it costs anything"),
        ("doctor", _doctor, "whether it can run here"),
    ):
        added = steps(name, run, text)
        added.add_argument("--cluster", type=Path, default=PRESET, metavar="FILE", help=f"preset; default {PRESET}")
        if name == "slurm":
            added.add_argument(
                "--sweep", action="append", default=[], metavar="key=a,b", help="a grid; may be repeated"
            )
    simulate = steps("simulate", _simulate, "what 8, 32, ... ranks would open, read and send at a restart")
    simulate.add_argument("--ranks", type=int, default=512, metavar="N", help="most ranks; default 512")
    recipe = command("recipe", _recipe, "look at images and write the configs of a chain for them")
    recipe.add_argument("name", metavar="NAME", help="of the configs and of the experiment")
    recipe.add_argument("--train", type=Path, nargs="+", metavar="DIR", help="datasets; default: data/NAME/train")
    for option, text in (("split", "split file of --train"), ("validation", "dataset"), ("test", "dataset")):
        recipe.add_argument(f"--{option}", type=Path, metavar="PATH", help=text)
    recipe.add_argument(
        "--budget",
        help="for the whole chain: a time such as 30m (the default) or 2h, or counted work such as 4T, 4 * 10^12 FLOPs",
    )
    recipe.add_argument(
        "--flips", choices=("test", "yes", "no"), default="test", help="horizontal flips; default: test"
    )
    models = ("auto", *FAMILIES)
    recipe.add_argument("--model", choices=models, default="auto", help="kind of model; vision_mamba has stage 1")
    recipe.add_argument(
        "--again", action="store_true", help="write configs that exist anew; edited ones are kept aside"
    )
    demo = command("demo", _demo, "all stages on the bundled digits")
    demo.add_argument("--seeds", type=int, nargs="+", default=[0])
    demo.add_argument("--nproc", type=int, default=2)
    status = command("status", _status, "how far every stage of an experiment is")
    status.add_argument("experiments", nargs="*", metavar="EXPERIMENT", help="default: all")
    status.add_argument("--root", type=Path, default=Path("runs"))
    reports.add_commands(commands)
    return parser


def _write_missing(given: argparse.Namespace) -> None:
    """Write the configs of a chain that has none, if its data are where README puts them; say that a budget came too late."""
    from launchers import chain
    from launchers.recipe import write

    if given.stage != chain.CHAIN:
        return
    budget = getattr(given, "budget", None)
    order = None if "," in given.config else write.order_for_chain(given.config, budget)
    if order:
        write.write(order)
    elif budget and not write.has_budget(given.config, budget):
        print(
            f"note: --budget {budget} changes nothing, since the configs of {given.config} exist; `python -m launchers recipe"
            f" {given.config} --budget {budget} --again` writes them anew",
            file=sys.stderr,
        )


def _recipe(given: argparse.Namespace) -> int:
    from launchers.recipe import write

    known = write.order_for(given.name, None)
    if known is None and not given.train:
        raise ConfigError(
            f"there is no dataset at data/{given.name}/train; give its folders with --train, or make one with"
            " `python -m pipeline.data convert`"
        )
    order = known if known and not given.train else write.Order(name=given.name, train=tuple(given.train))
    options = ("split", "validation", "test", "budget")
    typed = {name: getattr(given, name) for name in options if getattr(given, name) is not None}
    write.write(replace(order, flips=given.flips, model=given.model, again=given.again, **typed))
    return 0


def _steps(given: argparse.Namespace) -> tuple[Any, Any]:
    """The steps and the cluster of a command that has --cluster."""
    from launchers import chain

    _write_missing(given)

    cluster, overrides = chain.read_cluster(find_config(given.cluster), given.overrides)
    return chain.read_steps(given.stage, given.config, overrides), cluster


def _local(given: argparse.Namespace) -> int:
    from launchers import chain, local

    _write_missing(given)
    steps = chain.read_steps(given.stage, given.config, given.overrides)
    if given.stage != chain.CHAIN:
        return local.run(steps, given.nproc)
    from launchers.plan import planner
    from pipeline.report import experiment as report

    planner.plan_ahead(steps, given.nproc)
    code = local.run(steps, given.nproc)
    if code == 0 and not given.no_report:
        print(f"report: {report.run([steps[0].folder.parent], None)}")
    return code


def _demo(given: argparse.Namespace) -> int:
    from launchers import demo

    return demo.run(given.seeds, given.nproc)


def _slurm(given: argparse.Namespace) -> int:
    from launchers import chain, slurm

    _write_missing(given)
    cluster, overrides = chain.read_cluster(given.cluster, given.overrides)
    points = chain.read_points(given.stage, given.config, overrides, given.sweep)
    name = chain.read_steps(given.stage, given.config, overrides)[0].folder.parent
    jobs = slurm.run(points, cluster, name.with_name(f"{name.name}-sweep") if given.sweep else name)
    for job in jobs:
        print(f"{job.experiment} {job.stage}: job {job.job_id} {job.state}")
    if not jobs:
        print("nothing to submit: all stages are complete")
    return 0


def _sweep(given: argparse.Namespace) -> int:
    from launchers import chain
    from launchers.sweep import search
    from launchers.sweep.space import read_axes
    from launchers.sweep.trials import Order

    if min(given.trials, given.jobs) < 1:
        raise ConfigError(f"--trials {given.trials} --jobs {given.jobs}: give 1 or more")
    cluster, overrides = None, given.overrides
    if given.cluster is not None:
        cluster, overrides = chain.read_cluster(find_config(given.cluster), overrides)
    order = Order(
        stage=given.stage,
        config=given.config,
        overrides=tuple(overrides),
        axes=tuple(read_axes(given.over)),
        trials=given.trials,
        sampler=given.sampler,
        seed=given.seed,
        jobs=given.jobs,
        nproc=given.nproc,
    )
    return search.run(order, cluster)


def _plan(given: argparse.Namespace) -> int:
    from launchers.plan import planner

    return planner.run(*_steps(given))


def _simulate(given: argparse.Namespace) -> int:
    from launchers import chain
    from launchers.simulate import command

    return command.run(chain.read_steps(given.stage, given.config, given.overrides), given.ranks)


def _doctor(given: argparse.Namespace) -> int:
    from launchers import doctor

    return doctor.run(*_steps(given))


def _status(given: argparse.Namespace) -> int:
    from launchers import status

    return status.show(given.root, given.experiments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
