"""A stage, or stage after stage, in NPROC processes on this machine, without torchrun: it would turn every exit code into 1.

Each process gets torchrun's environment variables. The first rank that fails decides the exit code; the others are
ended within seconds. Signals are passed on, once, and the ranks save together. No process outlives the launcher.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import FrameType

from launchers.chain import Step, open_steps
from pipeline.errors import DistributedFailure, Interrupted
from pipeline.train.signals import STOPPING

GRACE_SECONDS = 10.0
_PR_SET_PDEATHSIG = 1
# When several have failed within a glance: a reason comes before a kill, a bug, and the loss of a peer.
_BLAME = {1: 2, DistributedFailure.exit_code: 3}


def run(steps: Sequence[Step], nproc: int) -> int:
    """Run what is not complete, in order; returns 0, or the exit code of the first stage that did not complete.

    All are checked before any process is started. Raises what `check` raises.
    """
    for step in open_steps(steps, nproc):
        if len(steps) > 1:
            print(f"\n== {step.config.run.experiment}, {step.stage} ==", flush=True)
        code = spawn([sys.executable, "-m", "stages", step.stage, str(step.path), *step.overrides], nproc)
        if code:
            return code
    return 0


def spawn(command: Sequence[str], nproc: int) -> int:
    """Run `command` as `nproc` ranks and return the exit code of the first that failed, or 0."""
    threads = max(1, (os.cpu_count() or 1) // nproc)
    shared = {
        "WORLD_SIZE": str(nproc),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        "PYTHONWARNINGS": os.environ.get("PYTHONWARNINGS", "ignore"),
    }
    ranks: list[subprocess.Popen[bytes]] = []
    relayed: list[int] = []
    relay = _relay(ranks, relayed)
    previous = {number: signal.signal(number, relay) for number in STOPPING}
    try:
        for rank in range(nproc):
            started = subprocess.Popen(
                command,
                env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                start_new_session=True,  # Ctrl-C reaches the launcher alone, which passes it on once
                preexec_fn=_die_with_parent,
            )
            ranks.append(started)
        for number in tuple(relayed):  # it came while the ranks were being started
            relay(number, None)
        return _wait(ranks, relayed)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        _end(ranks)


def _wait(ranks: list[subprocess.Popen[bytes]], relayed: list[int]) -> int:
    while True:
        codes = [rank.poll() for rank in ranks]
        failed = [(i, code) for i, code in enumerate(codes) if code]
        if failed:
            rank, code = min(failed, key=lambda f: _BLAME.get(f[1], 0 if f[1] > 0 else 1))
            if code == Interrupted.exit_code:
                _wait_all(ranks, GRACE_SECONDS)
                return code
            if -code in relayed:  # it was too young to have a handler
                return Interrupted.exit_code
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


def _relay(ranks: list[subprocess.Popen[bytes]], relayed: list[int]) -> Callable[[int, FrameType | None], None]:
    def relay(number: int, frame: FrameType | None) -> None:
        relayed.append(number)
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(number)

    return relay


def _wait_all(ranks: list[subprocess.Popen[bytes]], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
        time.sleep(0.05)


def _end(ranks: list[subprocess.Popen[bytes]]) -> None:
    """Whoever is still there gets a moment, then none: a rank that was killed leaves its data workers behind."""
    for rank in ranks:
        if rank.poll() is None:
            rank.terminate()
    _wait_all(ranks, 2.0)
    for rank in ranks:
        if rank.poll() != 0:
            with suppress(ProcessLookupError):
                os.killpg(rank.pid, signal.SIGKILL)
        rank.wait()


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
