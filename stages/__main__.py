"""python -m stages <arm|distill|semi> CONFIG [key=value ...]
python -m stages <arm|distill|semi> --replay RUN DATA_STEP

Runs one stage in this process (one rank of it, if torchrun's environment variables say so); or takes the step of a run
folder again that stands at that data_step of its data, on one CPU process, and names the first value that is not finite.
Exit codes: 0 complete; 2 config; 3 data; 4 hand-over or checkpoint; 5 environment; 6 diverged; 7 distributed failure;
75 interrupted and saved, start again to continue; 130 a second Ctrl-C ended it without saving.
"""

import argparse
import errno
import importlib
import json
import logging
import os
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

from pipeline.config import choose, load_config
from pipeline.errors import ConfigError, DistributedFailure, EnvironmentProblem, Interrupted, PipelineError
from pipeline.train.signals import interrupt_on_signals
from stages import SPECS
from stages.check import check, derive_batches, is_complete
from stages.spec import StageSpec

# What a disk can do to any write at any moment.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE)


def main(arguments: list[str]) -> int:
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
    rank = os.environ.get("RANK", "0")
    interrupt_on_signals()
    threading.excepthook = _of_a_thread
    try:
        spec = choose("stage", given.stage, SPECS)
        if given.replay:
            return _replay(spec, Path(given.replay[0]), given.replay[1])
        config = load_config(spec.config, given.config, given.overrides)
        if is_complete(config):
            return 0
        if rank == "0":  # the launcher has checked already; the other ranks need not again
            check(config, world_size=_world_size())
        logging.basicConfig(
            level=logging.INFO if rank == "0" else logging.WARNING, format="%(message)s", stream=sys.stderr
        )
        importlib.import_module(spec.module).run(config)
    except PipelineError as error:
        # Of an interruption every rank would say the same.
        if rank == "0" or not isinstance(error, Interrupted):
            print(f"{'' if isinstance(error, Interrupted) else 'error: '}{error}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped at once; the newest checkpoint stands, start it again to continue", file=sys.stderr, flush=True)
        return 130
    except OSError as error:
        if error.errno not in _DISK:
            traceback.print_exc()
            return 1
        print(
            f"error: {error.filename or 'the run folder'}: {os.strerror(error.errno)}; make room or mend the disk, and start"
            " again: the newest checkpoint stands",
            file=sys.stderr,
            flush=True,
        )
        return EnvironmentProblem.exit_code
    except Exception as error:
        from pipeline.train.distributed import is_communication_failure

        if not is_communication_failure(error):
            traceback.print_exc()
            return 1
        print(f"error: rank {rank} lost another rank: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
        return DistributedFailure.exit_code
    return 0


def _of_a_thread(error: threading.ExceptHookArgs) -> None:
    """TensorBoard writes in a thread of its own: of a full disk the main one will say enough."""
    if not (isinstance(error.exc_value, OSError) and error.exc_value.errno in _DISK):
        threading.__excepthook__(error)


def _replay(spec: StageSpec[Any], folder: Path, data_step: str) -> int:
    """One process on the CPU takes a step of a run again. Returns 0 whatever it finds; the run is not touched."""
    if not data_step.isdigit():
        raise ConfigError(f"--replay: DATA_STEP is {data_step!r}; it must be a number, as in {folder}/incidents.jsonl")
    for name in ("config.yaml", "environment.json"):
        if not (folder / name).is_file():
            raise ConfigError(f"--replay: {folder} is no run folder, it has no {name}; give runs/EXPERIMENT/STAGE")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    there = load_config(spec.config, folder / "config.yaml", [])
    world_size = json.loads((folder / "environment.json").read_text())["world_size"]
    # At once what a process of the run took: the whole batch of many may not fit here.
    micro_batch, _ = derive_batches(there.loop.global_batch, world_size, there.engine.micro_batch)
    alone = ("zero_stage=0", f"micro_batch={micro_batch}", "offload_optimizer=false", "compile=false")
    config = load_config(spec.config, folder / "config.yaml", [f"engine.{value}" for value in alone])
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    from pipeline.train.replay import Replay, Replayed

    try:
        importlib.import_module(spec.module).run(config, Replay(folder, int(data_step)))
    except Replayed as found:
        print(found)
    return 0


def _world_size() -> int:
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdigit() or int(text) < 1:
        raise EnvironmentProblem(f"WORLD_SIZE is {text!r}; it must be the number of processes, or unset for one")
    return int(text)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    # A rank that failed must not wait for the others in the atexit handlers of a process group they still use.
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
