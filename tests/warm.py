"""Processes of the tests that start in a fraction of a second: a warm server has imported torch and forks each of them.

They are real processes, with a process id, an environment, output and an exit code of their own; they only skip the
imports, which take longer than what most tests run. `start` and `run` mirror `subprocess.Popen` and `subprocess.run` for
commands of the form `[sys.executable, "-m", MODULE, ...]`.
"""

import atexit
import ctypes
import functools
import importlib
import itertools
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from tests.waiting import slowness

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
_PR_SET_PDEATHSIG = 1
_NUMBERS = itertools.count()
_STARTING = threading.Lock()  # a study asks from several threads


class Process:
    """A process that the warm server has forked. Its standard streams are files, so that nothing needs to be read meanwhile."""

    def __init__(self, connection: socket.socket, args: Sequence[str], output: Path, errors: Path) -> None:
        self.args, self.returncode = args, None
        self._connection, self._output, self._errors, self._read = connection, output, errors, b""
        self.pid = int(self._line(None) or 0)

    def __del__(self) -> None:
        self._connection.close()

    def _line(self, timeout: float | None) -> str | None:
        """The server's next line: the process id, then the exit code; None if it does not come in time."""
        self._connection.settimeout(timeout)
        while b"\n" not in self._read:
            try:
                more = self._connection.recv(64)
            except (TimeoutError, BlockingIOError):
                return None
            assert more, "the warm server has died"
            self._read += more
        line, _, self._read = self._read.partition(b"\n")
        return line.decode()

    def poll(self) -> int | None:
        """The exit code, negative for a signal, or None while the process runs."""
        if self.returncode is None and (line := self._line(0.0)) is not None:
            self._ended(int(line))
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end; raises subprocess.TimeoutExpired."""
        if self.returncode is None:
            line = self._line(timeout)
            if line is None:
                raise subprocess.TimeoutExpired(list(self.args), timeout or 0.0)
            self._ended(int(line))
        assert self.returncode is not None
        return self.returncode

    def _ended(self, code: int) -> None:
        self.returncode = code
        self._connection.close()

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end and return the output and the errors as text."""
        self.wait(timeout)
        return self.output, self.errors

    @property
    def output(self) -> str:
        """Standard output so far."""
        return self._output.read_text(errors="replace")

    @property
    def errors(self) -> str:
        """Standard error so far."""
        return self._errors.read_text(errors="replace")

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End the process at once."""
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        """Ask the process to end."""
        self.send_signal(signal.SIGTERM)


def start(command: Sequence[str], env: Mapping[str, str] = ENVIRONMENT, cwd: Path = ROOT) -> Process:
    """Start `[sys.executable, "-m", MODULE, ...]`; returns while it runs.

    Args:
        command: As for subprocess; options of Python itself are not supported.
        env: Its whole environment. OMP_NUM_THREADS is read when torch is imported, so it cannot differ from ENVIRONMENT's.
        cwd: Its folder.
    """
    assert list(command[:2]) == [sys.executable, "-m"], command
    slowness()  # measured here, since the process could end while its first wait measures it
    with _STARTING:
        server = Path(_server())
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(server))
    number = next(_NUMBERS)
    output, errors = (server.with_name(f"{number}.{name}") for name in ("out", "err"))
    asked = {"argv": list(command[2:]), "env": dict(env), "cwd": str(cwd)}
    with output.open("wb") as to_output, errors.open("wb") as to_errors:
        message = json.dumps(asked).encode() + b"\n"
        socket.send_fds(connection, [message], [to_output.fileno(), to_errors.fileno()])
    return Process(connection, command, output, errors)


def run(
    command: Sequence[str], env: Mapping[str, str] = ENVIRONMENT, cwd: Path = ROOT, timeout: float | None = None
) -> "subprocess.CompletedProcess[str]":
    """Run such a command to its end."""
    process = start(command, env, cwd)
    try:
        process.wait(timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return subprocess.CompletedProcess(list(command), process.returncode or 0, process.output, process.errors)


@functools.cache
def _server() -> str:
    """Start this test process's server; the address of its socket. It ends with the test process."""
    folder = tempfile.TemporaryDirectory(prefix="warm-")
    address = str(Path(folder.name) / "socket")
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.warm", address], cwd=ROOT, env=ENVIRONMENT, stdin=subprocess.DEVNULL
    )
    atexit.register(_stop, server, folder)
    deadline = time.monotonic() + 300
    while not Path(address).exists():
        assert server.poll() is None, "the warm server did not start"
        assert time.monotonic() < deadline, "the warm server takes too long to start"
        time.sleep(0.02)
    return address


def _stop(server: "subprocess.Popen[bytes]", folder: "tempfile.TemporaryDirectory[str]") -> None:
    server.kill()
    server.wait()
    folder.cleanup()


def _serve(address: str) -> None:
    """Import what every stage imports, then fork a process for each connection and report its id and its exit code."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("pipeline.ops.torchvision_cpu").allow_torchvision()
        for module in (
            "torch._dynamo",
            "deepspeed",
            "stages.arm",
            "stages.distill",
            "stages.semi",
            "torch.utils.tensorboard",
            "matplotlib.figure",
            "matplotlib.backends.backend_agg",
            "torchvision.transforms.v2.functional",
            "timm.data",
            "sklearn.linear_model",
        ):
            importlib.import_module(module)
    wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake_write)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{address}.new")
    listener.listen(64)
    os.rename(f"{address}.new", address)
    waiting: dict[int, socket.socket] = {}
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    selector.register(wake_read, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fileobj is listener:
                connection, _ = listener.accept()
                data, descriptors, _, _ = socket.recv_fds(connection, 1 << 20, 2)
                while not data.endswith(b"\n"):
                    data += connection.recv(1 << 20)
                pid = os.fork()
                if pid == 0:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    for other in (listener, connection, *waiting.values()):
                        other.close()
                    os.close(wake_read), os.close(wake_write)
                    _become(json.loads(data), descriptors)
                for descriptor in descriptors:
                    os.close(descriptor)
                waiting[pid] = connection
                connection.sendall(f"{pid}\n".encode())
            else:
                os.read(wake_read, 4096)
        while waiting:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            connection = waiting.pop(pid)
            with suppress(OSError):  # the test has ended without waiting
                connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
            connection.close()


def _become(asked: dict, descriptors: list[int]) -> None:
    """In the forked process: take over streams, environment, folder and command line, then run the module. Never returns."""
    code = 1
    try:
        os.dup2(descriptors[0], 1)
        os.dup2(descriptors[1], 2)
        for descriptor in descriptors:
            os.close(descriptor)
        os.environ.clear()
        os.environ.update(asked["env"])
        os.chdir(asked["cwd"])
        module, *arguments = asked["argv"]
        sys.argv = [module, *arguments]
        sys.orig_argv = [sys.executable, "-m", module, *arguments]
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
            code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
            if isinstance(ended.code, str):
                print(ended.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve(sys.argv[1])
