"""Run one stage, or all of them in turn, in several processes on this machine.

torchrun is not used, because it turns every exit code into 1. Each process gets torchrun's environment variables. When a
rank fails, the others are ended within seconds, and `exit_codes.blame` chooses the exit code. A signal is passed on once,
and the ranks save together. No process outlives the launcher.
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

from launchers import data_check
from launchers.chain import Step, open_steps
from pipeline.exit_codes import ExitCode, blame
from pipeline.train.gpus import QUIET_BUT_FOR_CUDA
from pipeline.train.signals import STOPPING

GRACE_SECONDS = 10.0
_PR_SET_PDEATHSIG = 1


def run(steps: Sequence[Step], nproc: int) -> int:
    """Run the stages that are not complete, in order. All are checked before any process starts, and a chain's data too.

    Args:
        steps: The stages.
        nproc: The number of processes of each stage.

    Returns:
        0, or the exit code of the first stage that did not complete.

    Raises:
        PipelineError: What `stages.check.check` raises.
    """
    todo = open_steps(steps, nproc)
    if len(steps) > 1 and len(todo) == len(steps):
        data_check.run(steps)
    for step in todo:
        if len(steps) > 1:
            print(f"\n== {step.config.run.experiment}, {step.stage} ==", flush=True)
        code = spawn([sys.executable, "-m", "stages", step.stage, str(step.path), *step.overrides], nproc)
        if code:
            return code
    return 0


def spawn(command: Sequence[str], nproc: int) -> int:
    """Run `command` as `nproc` ranks.

    Returns:
        0, or the exit code that says most about the failure.
    """
    threads = max(1, (os.cpu_count() or 1) // nproc)
    shared = {
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        "PYTHONWARNINGS": os.environ.get("PYTHONWARNINGS", QUIET_BUT_FOR_CUDA),
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
                preexec_fn=die_with_parent,
            )
            ranks.append(started)
        for number in tuple(relayed):  # signals that came while the ranks were being started
            relay(number, None)
        return _wait(ranks, relayed)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        _end(ranks)


def _wait(ranks: list[subprocess.Popen[bytes]], relayed: list[int]) -> int:
    while True:
        codes = [rank.poll() for rank in ranks]
        code = blame(code or 0 for code in codes)
        if code == ExitCode.INTERRUPTED:
            _wait_all(ranks, GRACE_SECONDS)
            return code
        if -code in relayed:  # the rank was too young to have a handler
            return ExitCode.INTERRUPTED
        if code < 0:
            print(
                f"error: rank {codes.index(code)} was killed by {signal.Signals(-code).name}; the other ranks are ended",
                file=sys.stderr,
                flush=True,
            )
            return ExitCode.DISTRIBUTED
        if code:
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
    """Send SIGTERM, and SIGKILL after 2 s. It goes to whole sessions: a rank that was killed leaves its data workers behind."""
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


def die_with_parent() -> None:
    """Let a child be killed when its parent ends, for `preexec_fn`."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
