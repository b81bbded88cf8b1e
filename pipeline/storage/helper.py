"""The process that reads object stores for this one, and for all processes that are forked from it."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from pipeline.errors import EnvironmentProblem
from pipeline.storage.objects import MAX_REQUEST, Transient

_ROOT = Path(__file__).parents[2]  # what `import pipeline` finds, wherever this process was started
_lock = threading.Lock()
_helper: tuple[socket.socket, subprocess.Popen[bytes]] | None = None


def _renew_lock() -> None:
    """Give a forked process an open lock: the thread that held it may not exist there."""
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)


@contextlib.contextmanager
def ask(request: dict[str, Any]) -> Iterator[Iterator[Any]]:
    """Send a request to the helper, which is started if there is none; give its answers to the block.

    Each request carries the pipe for its answers. So threads and forked processes share the helper without a lock.

    Raises:
        Transient: Another attempt may succeed, for example because the helper was killed.
        PipelineError: No other attempt helps.
    """
    message = json.dumps(request).encode()
    assert len(message) <= MAX_REQUEST
    receiving, sending = Pipe(duplex=False)
    with receiving:
        with sending:
            _send(message, sending)
        yield _answers(receiving)


def _send(message: bytes, sending: Connection) -> None:
    global _helper
    with _lock:
        if _helper is None:
            _helper = _start()
        try:
            socket.send_fds(_helper[0], [message], [sending.fileno()])
        except OSError:
            _helper[0].close()
            _helper = None
            raise Transient("the process that reads object stores died") from None


def _answers(receiving: Connection) -> Iterator[Any]:
    while True:
        try:
            answer = receiving.recv()
        except EOFError:
            raise Transient("the process that reads object stores died") from None
        if isinstance(answer, Exception):
            raise answer
        if answer is None:
            return
        yield answer


def _start() -> tuple[socket.socket, subprocess.Popen[bytes]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with theirs:
        try:
            # In a session of its own, Ctrl-C does not reach it; it ends when the last holder of `ours` has ended.
            process = subprocess.Popen(
                [sys.executable, "-c", f"from pipeline.storage.objects import serve; serve({theirs.fileno()})"],
                env=os.environ | {"PYTHONPATH": path},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            raise EnvironmentProblem(
                f"the process that reads object stores cannot be started ({error.strerror}); free memory, or raise the limit"
                " of processes"
            ) from None
    return ours, process
