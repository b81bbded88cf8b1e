"""NPROC processes of a stage on this machine, without torchrun: it would turn every exit code into 1.

Each process gets torchrun's environment variables. The first rank that fails decides the exit code; the others are
ended within seconds. Signals are passed on, once, and the ranks save together. No process outlives the launcher.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from pipeline.config import choose, load_config
from pipeline.errors import DistributedFailure, Interrupted
from stages import STAGES
from stages.check import check, is_complete

GRACE_SECONDS = 10.0
_PR_SET_PDEATHSIG = 1


def run_stage(stage: str, config_path: Path, overrides: Sequence[str], nproc: int) -> int:
    """Check once, then run; returns the stage's exit code. Raises what `check` raises, before any process is started."""
    entry = choose("stage", stage, STAGES)
    config = load_config(entry.config, config_path, overrides)
    if is_complete(stage, config):
        return 0
    check(stage, config, world_size=nproc)
    return spawn([sys.executable, "-m", "stages", stage, str(config_path), *overrides], nproc)


def spawn(command: Sequence[str], nproc: int) -> int:
    """Run `command` as `nproc` ranks and return the exit code of the first that failed, or 0."""
    from pipeline.train.distributed import free_port

    threads = max(1, (os.cpu_count() or 1) // nproc)
    shared = {
        "WORLD_SIZE": str(nproc),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        "PYTHONWARNINGS": os.environ.get("PYTHONWARNINGS", "ignore"),
    }
    ranks = [
        subprocess.Popen(
            command,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            start_new_session=True,  # Ctrl-C reaches the launcher alone, which passes it on once
            preexec_fn=_die_with_parent,
        )
        for rank in range(nproc)
    ]
    previous = {
        s: signal.signal(s, _relay(ranks)) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    }
    try:
        return _wait(ranks)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        _end(ranks)


def _wait(ranks: list[subprocess.Popen[bytes]]) -> int:
    while True:
        codes = [rank.poll() for rank in ranks]
        failed = [(i, code) for i, code in enumerate(codes) if code]
        if failed:
            # A rank that lost its peer fails a moment after it: prefer the code of whoever has a reason.
            rank, code = next(((i, c) for i, c in failed if c > 1), failed[0])
            if code == Interrupted.exit_code:
                _wait_all(ranks, GRACE_SECONDS)
                return code
            if code < 0:
                print(
                    f"error: rank {rank} was killed by {signal.Signals(-code).name}; the others are ended",
                    file=sys.stderr,
                    flush=True,
                )
                return DistributedFailure.exit_code
            return code
        if all(code == 0 for code in codes):
            return 0
        time.sleep(0.05)


def _relay(ranks: list[subprocess.Popen[bytes]]) -> Callable[[int, FrameType | None], None]:
    def relay(number: int, frame: FrameType | None) -> None:
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(number)

    return relay


def _wait_all(ranks: list[subprocess.Popen[bytes]], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
        time.sleep(0.05)


def _end(ranks: list[subprocess.Popen[bytes]]) -> None:
    """Whoever is still there gets a moment, then none."""
    for rank in ranks:
        if rank.poll() is None:
            rank.terminate()
    _wait_all(ranks, 2.0)
    for rank in ranks:
        if rank.poll() is None:
            os.killpg(rank.pid, signal.SIGKILL)
        rank.wait()


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
