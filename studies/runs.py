"""What the studies are made of: data prepared and stages run as a person would, each once; the first failure ends the study."""

import os
import subprocess
import sys
from collections.abc import Sequence

from pipeline.data import main as data


def prepare(*arguments: str) -> None:
    """`python -m pipeline.data ARGUMENTS`; SystemExit with its code if it fails."""
    if code := data(list(arguments)):
        raise SystemExit(code)


def run(stage: str, config: str, values: Sequence[str], *, name: str) -> None:
    """configs/STAGE/CONFIG.yaml with `values`, on one thread; the stage reuses what is done, and refuses another config under
    the same folder. Says `name` and how it ended; SystemExit with the stage's code if it failed."""
    done = subprocess.run(
        [sys.executable, "-m", "stages", stage, f"configs/{stage}/{config}.yaml", *values],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    print(f"{name}: {done.stderr if done.returncode else 'done'}", file=sys.stderr, flush=True)
    if done.returncode:
        raise SystemExit(done.returncode)
