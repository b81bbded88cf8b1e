"""Delegate the commands that read finished runs or measure models to the modules that implement them.

Each of those modules has a `main(arguments)` of its own and also runs as `python -m MODULE`.
"""

import argparse
import importlib
import sys
from typing import Any

# name -> (module, help)
COMMANDS = {
    "report": ("pipeline.report.__main__", "write what happened and how accurate the models are on one page"),
    "evaluate": ("pipeline.evaluate.__main__", "evaluate an export on a dataset, in N processes"),
    "efficiency": ("benchmarks.efficiency", "time real stage-3 steps of several configs side by side"),
    "inference": ("benchmarks.inference", "measure throughput against resolution"),
    "pareto": ("benchmarks.pareto", "draw measured speed against reported accuracy"),
    "fields": ("pipeline.report.fields", "draw effective receptive fields"),
}


def add_commands(commands: Any) -> None:
    """Add a parser for each command; what follows the command's name reaches the module as `given.rest`.

    Args:
        commands: The subparsers of `python -m launchers`.
    """
    for name, (_, help_) in COMMANDS.items():
        # Without help of its own, --help is passed on too.
        parser = commands.add_parser(name, help=help_, add_help=False)
        if name == "evaluate":
            parser.add_argument("--nproc", type=int, default=1)
        parser.set_defaults(run=_delegate)


def _delegate(given: argparse.Namespace) -> int:
    module = COMMANDS[given.command][0]
    if given.command == "evaluate":
        from launchers import local

        return local.spawn([sys.executable, "-m", module.removesuffix(".__main__"), *given.rest], given.nproc)
    return importlib.import_module(module).main(given.rest)
