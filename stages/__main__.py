"""Run one stage in this process, or replay one step of a run.

python -m stages STAGE CONFIG [key=value ...]
python -m stages STAGE --replay RUN DATA_STEP

The process is one rank of several if torchrun's environment variables say so. With --replay, it takes one data step of a
finished or failed run again, alone and on the CPU, and names the first value that is not finite.
The exit code is one of pipeline/exit_codes.py; docs/exit-codes.md says what to do about each.
"""

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import Any

from pipeline.cli import guarded, leave
from pipeline.config import choose, load_config
from pipeline.errors import ConfigError, DistributedFailure, PipelineError, first_line
from pipeline.jsonl import read_object
from pipeline.train.rendezvous import rendezvous
from pipeline.train.signals import interrupt_on_signals
from stages import SPECS
from stages.check import check, derive_batches, is_complete
from stages.spec import StageSpec


def main(arguments: list[str]) -> int:
    """Run the command and return its exit code."""
    return guarded(_run, arguments, explain=_communication_failure, rank=_rank())


def _run(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m stages", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", metavar="STAGE", help=" | ".join(SPECS))
    parser.add_argument("config", nargs="?", type=Path, metavar="CONFIG", help="for example configs/arm/demo.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example optim.lr=1e-3")
    parser.add_argument("--replay", nargs=2, metavar=("RUN", "DATA_STEP"), help="for example runs/demo/arm 1234")
    given = parser.parse_args(arguments)
    if (given.config is None) == (given.replay is None):
        parser.error("give a CONFIG, or --replay RUN DATA_STEP alone")
    interrupt_on_signals()
    spec = choose("stage", given.stage, SPECS)
    world = rendezvous(os.environ)
    if given.replay:
        return _replay(spec, Path(given.replay[0]), given.replay[1])
    config = load_config(spec.config, given.config, given.overrides)
    if is_complete(config):
        return 0
    if world["RANK"] == "0":  # the launcher has checked already; one check is enough
        check(config, world_size=int(world["WORLD_SIZE"]))
    level = logging.INFO if world["RANK"] == "0" else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
    from stages.drivers import train

    train(config)
    return 0


def _replay(spec: StageSpec[Any], folder: Path, data_step: str) -> int:
    """Take a data step of a run again, in one process on the CPU. The run is not changed; returns 0 whatever is found."""
    if not data_step.isdigit():
        raise ConfigError(
            f"--replay: DATA_STEP is {data_step!r}, but it must be a number, as in {folder}/incidents.jsonl"
        )
    for name in ("config.yaml", "environment.json"):
        if not (folder / name).is_file():
            raise ConfigError(f"--replay: {folder} has no {name}, so it is no run folder; give runs/EXPERIMENT/STAGE")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    there = load_config(spec.config, folder / "config.yaml", [])
    world_size = read_object(folder / "environment.json").get("world_size")
    if not isinstance(world_size, int) or world_size < 1:
        raise ConfigError(
            f'--replay: {folder / "environment.json"} does not say how many processes the run had; write "world_size" there'
        )
    # One process takes at once what a process of the run took: the whole batch of many may not fit here.
    micro_batch, _ = derive_batches(there.loop.global_batch, world_size, there.engine.micro_batch)
    alone = ("zero_stage=0", f"micro_batch={micro_batch}", "offload_optimizer=false", "compile=false")
    config = load_config(spec.config, folder / "config.yaml", [f"engine.{value}" for value in alone])
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    from pipeline.train.replay import Replay
    from stages.drivers import replay

    print(replay(config, Replay(folder, int(data_step))))
    return 0


def _rank() -> str:
    return os.environ.get("RANK", "0")


def _communication_failure(error: Exception) -> PipelineError | None:
    if "torch" not in sys.modules:
        return None
    from pipeline.train.distributed import is_communication_failure

    if not is_communication_failure(error):
        return None
    return DistributedFailure(f"rank {_rank()} lost another rank: {first_line(error)}")


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
