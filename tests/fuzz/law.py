"""The law of every case, and the forked child that is held to it.

A case ends within 10 s, under 1 GiB more memory, with a documented exit code and a sentence, without a stack trace; it
writes nothing outside its folder, runs nothing and asks nobody on the network. Limits of the kernel and an audit hook hold
the child to it, so that a case can neither hang nor harm its caller.

The 10 s are 10 s of processor time, which the kernel counts, and 10 s in which the child and all its children sleep. Time
in which they wait for a processor or a disk counts as neither, so a loaded machine makes no violation. A limit of wall
clock that no sound case comes near ends what both miss.
"""

import dataclasses
import importlib
import os
import random
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from tests.fuzz.kinds import KINDS, Case, Material

SECONDS = 10
_WALL_SECONDS = 180
_LOOK_SECONDS = 0.05  # between two looks at whether a child sleeps
MEMORY = 2**30
CODES = {0, 2, 3, 4, 5, 6, 7, 75, 130}
_UNMADE = 99  # exit code of a case that could not be made: a fault of the fuzzer
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = {
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
    "shutil.rmtree",
}
_RUNS = {"os.system", "subprocess.Popen", "os.exec", "os.posix_spawn"}
_HELPER = "from pipeline.storage.objects import serve"  # the process that reads addresses
_TOOLS = ("git", "g++", "clang++", "c++", "uname")


@dataclasses.dataclass
class Running:
    """A case whose child has been forked."""

    kind: str
    number: int
    pid: int
    folder: Path
    begin: float
    looked: float
    asleep: float = 0.0  # seconds in which the child and all its children slept

    def look(self) -> str:
        """Add up its sleep; returns which limit it has passed, if any."""
        now = time.monotonic()
        if now - self.looked < _LOOK_SECONDS:
            return ""
        if _sleeps(self.pid) and now - self.looked < 10 * _LOOK_SECONDS:  # beyond it the fuzzer itself was kept waiting
            self.asleep += now - self.looked
        self.looked = now
        if self.asleep > SECONDS:
            return f"it slept for {SECONDS} s"
        return f"it ran longer than {_WALL_SECONDS} s" if now - self.begin > _WALL_SECONDS else ""


def start(kind: str, number: int, seed: int, folder: Path, have: Material) -> Running:
    """Fork the child of a case."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "tmp").mkdir(parents=True)
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        _child(kind, random.Random(f"{seed}/{kind}/{number}"), folder, have)
    return Running(kind, number, pid, folder, time.monotonic(), time.monotonic())


def ended(case: Running) -> list[str] | None:
    """Return how a case broke the law, or None while it runs."""
    pid, status = os.waitpid(case.pid, os.WNOHANG)
    if pid == 0:
        passed = case.look()
        if not passed:
            return None
        _kill(case.pid)
        os.waitpid(case.pid, 0)
        return [passed]
    return list(_violations(case.folder, os.waitstatus_to_exitcode(status)))


def _violations(folder: Path, code: int) -> Iterator[str]:
    said = (folder / "stderr").read_text(errors="replace")
    if code == _UNMADE:
        yield f"the fuzzer could not make it: {said.strip().splitlines()[-1]}"
    elif code not in CODES:
        yield f"it was ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    if "Traceback" in said:
        yield f"a stack trace: {said.strip().splitlines()[-1][:200]}"
    elif code > 0 and "error" not in said and "\n! " not in (folder / "stdout").read_text(errors="replace"):  # a plan's
        yield f"exit code {code} without a sentence: {said[-200:]!r}"
    elif len(said) > 20_000:
        yield f"a sentence of {len(said)} characters"
    if (folder / "executed").exists():
        yield "code of the input ran"
    if (folder / "outside").exists():
        yield from sorted(set((folder / "outside").read_text(errors="replace").splitlines()))


def _sleeps(pid: int) -> bool:
    try:
        child = psutil.Process(pid)
        return all(
            process.status() in (psutil.STATUS_SLEEPING, psutil.STATUS_ZOMBIE)
            for process in (child, *child.children(recursive=True))
        )
    except psutil.Error:
        return False


def _kill(pid: int) -> None:
    for child in psutil.Process(pid).children(recursive=True):
        child.kill()
    os.kill(pid, signal.SIGKILL)


def _child(kind: str, rng: random.Random, folder: Path, have: Material) -> None:
    """Make the case and become its command. Never returns."""
    code = _UNMADE
    try:
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), number)
        os.chdir(folder)
        case = KINDS[kind](rng, folder, have)
        code = _run(case, folder)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run(case: Case, folder: Path) -> int:
    module = importlib.import_module(case.module)
    if not case.trains:  # what training does with a sound config is then not asked
        import stages.drivers

        stages.drivers.train = lambda config: None
    if case.module == "pipeline.report.__main__":
        from pipeline.report import figures

        figures._render = _sketch
    os.environ.update(
        {name: text.replace("\x00", "") for name, text in case.environment.items()} | {"TMPDIR": f"{folder}/tmp"}
    )
    if case.environment.get("HOME") == "":
        del os.environ["HOME"]
    tempfile.tempdir = None  # or the folder that this process's parent has found stays
    sys.argv = [case.module, *case.arguments]
    for kind, limit in (
        (resource.RLIMIT_AS, psutil.Process().memory_info().vms + MEMORY),
        (resource.RLIMIT_CPU, SECONDS),
        (resource.RLIMIT_FSIZE, case.largest),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (limit, limit))
    sys.addaudithook(_Watch(folder))
    try:
        return int(module.main(case.arguments))
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 1


def _sketch(paint: Any, size: tuple[float, float], colour: str, suffix: str, salt: str) -> bytes:
    """Paint a figure, and leave out what takes seconds: to lay it out and to write its file."""
    from matplotlib.figure import Figure

    if suffix == "svg":
        paint(Figure(figsize=size))
    return b'<svg xmlns="http://www.w3.org/2000/svg"/>'


class _Watch:
    """Notes what the law forbids: a write outside the folder, a program, an address outside this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = os.path.realpath(folder)
        self.notes = os.open(folder / "notes", os.O_WRONLY | os.O_CREAT)
        self.outside = f"{self.folder}/outside"
        self.busy = False

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.busy:
            return
        self.busy = True
        try:
            if event == "open":
                path, mode, flags = arguments
                writes = flags & _WRITING if isinstance(flags, int) else any(c in str(mode) for c in "wax+")
                if writes and not isinstance(path, int):
                    self._inside(event, path)
            elif event in _CHANGES:
                changed = arguments[:2] if event in ("os.rename", "os.link") else arguments[:1]
                if event != "os.mkdir" or not os.path.isdir(arguments[0]):
                    for path in changed:
                        self._inside(event, path)
            elif event in _RUNS:
                words = arguments[1] if len(arguments) > 1 else ()
                if os.path.basename(str(arguments[0])) not in _TOOLS and _HELPER not in str(words):
                    self._note(f"{event} {arguments[0]!r:.100}")
            elif event == "socket.connect" and isinstance(arguments[1], tuple):
                abroad = arguments[1][0] not in ("127.0.0.1", "::1")
                if abroad and arguments[0].type == socket.SOCK_STREAM:
                    self._note(f"connects to {arguments[1]}")
        finally:
            self.busy = False

    def _inside(self, event: str, path: Any) -> None:
        if isinstance(path, str | bytes | os.PathLike):
            found = os.path.realpath(os.fsdecode(path))
            if not found.startswith((f"{self.folder}/", "/dev/", "/proc/")) and found != self.folder:
                self._note(f"{event} outside its folder: {found[:200]}")

    def _note(self, text: str) -> None:
        with open(self.outside, "a", errors="replace") as file:
            file.write(text.replace("\n", " ") + "\n")
