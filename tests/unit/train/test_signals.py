"""What a signal does around the training loop, in a process of its own."""

import signal
import subprocess
import sys

import pytest

from pipeline.exit_codes import ExitCode
from tests.conftest import ROOT

PROCESS = """
import contextlib, os, signal, sys, time
from pipeline.cli import guarded, leave
from pipeline.errors import Diverged, Interrupted
from pipeline.train.signals import interrupt_on_signals, stop_flag

def send(times):
    for _ in range(times):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)

def run(arguments):
    how, signals = arguments
    interrupt_on_signals()
    if how == "before":
        send(int(signals))
    try:
        with stop_flag() as stop:
            if how == "diverges":
                raise Diverged("it diverged")
            if how == "saves":
                send(1)
                raise Interrupted(f"stopped by {stop.name}; all is saved")
            if how == "within":
                send(int(signals))
    finally:
        if how in ("diverges", "saves"):  # while the run's folder is closed
            send(int(signals))
    if how == "after":
        send(int(signals))
    if how == "optional":
        with contextlib.suppress(Exception):  # as a report goes on without its pictures
            send(1)
    return 0

leave(guarded(run, sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("how", "signals", "code", "sentence"),
    [
        ("before", 1, ExitCode.INTERRUPTED, "stopped by SIGINT outside the training loop; start it again to continue"),
        ("within", 1, ExitCode.COMPLETE, ""),
        ("within", 2, ExitCode.STOPPED, "stopped at once; start the same command again to continue"),
        ("after", 1, ExitCode.INTERRUPTED, "stopped by SIGINT outside the training loop; start it again to continue"),
        (
            "optional",
            1,
            ExitCode.INTERRUPTED,
            "stopped by SIGINT outside the training loop; start it again to continue",
        ),
        ("saves", 0, ExitCode.INTERRUPTED, "stopped by SIGINT; all is saved"),
        ("saves", 1, ExitCode.INTERRUPTED, "stopped by SIGINT; all is saved"),
        ("diverges", 1, ExitCode.DIVERGED, "error: it diverged"),
        ("diverges", 2, ExitCode.STOPPED, "stopped at once; start the same command again to continue"),
    ],
)
def test_a_signal_never_replaces_the_sentence_that_a_run_ends_with(
    how: str, signals: int, code: ExitCode, sentence: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROCESS, how, str(signals)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # the tests may run where it is ignored
    )
    assert (done.returncode, done.stderr.strip()) == (code, sentence)
