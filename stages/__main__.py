"""python -m stages <arm|distill|semi> CONFIG [key=value ...]

Runs one stage in this process (one rank of it, if torchrun's environment variables say so).
Exit codes: 0 complete; 2 config; 3 data; 4 hand-over or checkpoint; 5 environment; 6 diverged; 7 distributed failure;
75 interrupted and saved, start again to continue.
"""

import argparse
import importlib
import logging
import os
import sys
import traceback
from pathlib import Path

from pipeline.config import choose, load_config
from pipeline.errors import Interrupted, PipelineError
from stages import STAGES
from stages.check import check, is_complete


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m stages", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", metavar="STAGE", help=" | ".join(STAGES))
    parser.add_argument("config", type=Path, metavar="CONFIG", help="for example configs/arm/demo.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example optim.lr=1e-3")
    given = parser.parse_args(arguments)
    rank = os.environ.get("RANK", "0")
    try:
        stage = choose("stage", given.stage, STAGES)
        config = load_config(stage.config, given.config, given.overrides)
        if is_complete(given.stage, config):
            return 0
        check(given.stage, config, world_size=int(os.environ.get("WORLD_SIZE", "1")))
        logging.basicConfig(
            level=logging.INFO if rank == "0" else logging.WARNING, format="%(message)s", stream=sys.stderr
        )
        importlib.import_module(stage.module).run(config)
    except PipelineError as error:
        # Of an interruption every rank would say the same.
        if rank == "0" or not isinstance(error, Interrupted):
            print(f"{'' if isinstance(error, Interrupted) else 'error: '}{error}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped at once; the newest checkpoint stands, start it again to continue", file=sys.stderr, flush=True)
        return 130
    except Exception:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1:])
    # A rank that failed must not wait for the others in the atexit handlers of a process group they still use.
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
