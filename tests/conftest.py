"""What the tests share: the bundled digits as shards, and runs of real processes."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.exit_codes import blame
from pipeline.train.rendezvous import NAMES
from tests import warm
from tests.waiting import patience

ROOT, ENVIRONMENT = warm.ROOT, warm.ENVIRONMENT
if "PYTEST_XDIST_WORKER" in os.environ:
    # A worker for each core: with a thread for each core too, all threads wait for one another, and the tests of models took
    # three times as long. torch and numpy read this when they are imported, which happens later.
    os.environ |= {name: ENVIRONMENT[name] for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}


@pytest.fixture(autouse=True)
def _own_world() -> Iterator[None]:
    """Forget after each test what `distributed.start` has written into the environment, since commands refuse such a shell."""
    before = {name: os.environ.get(name) for name in NAMES}
    yield
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


@pytest.fixture(autouse=True)
def _own_threads() -> Iterator[None]:
    """Set torch's number of threads after each test as it was, so that a test may change it."""
    torch = sys.modules.get("torch")
    before = torch.get_num_threads() if torch else None
    yield
    if torch and before:
        torch.set_num_threads(before)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/, test/ and split.json of the long-tailed digits, as the demo makes them."""
    folder = tmp_path_factory.mktemp("data") / "digits"
    from pipeline.data import main

    main(["convert", "digits", "--out", str(folder)])
    split = ["split", str(folder / "train"), "--out", str(folder / "split.json")]
    main([*split, *"--imbalance 10 --labelled 0.1 --validation-per-class 15 --seed 0".split()])
    return folder


class Stages:
    """Runs stages as a person would, in processes of their own, in one folder."""

    def __init__(self, runs: Path, digits: Path) -> None:
        self.runs, self.digits = runs, digits

    def overrides(self, *more: str) -> list[str]:
        data = [
            f"data.train={self.digits / 'train'}",
            f"data.test={self.digits / 'test'}",
            f"data.split={self.digits / 'split.json'}",
        ]
        return [f"run.root={self.runs}", *data, *more]

    def command(self, stage: str, *more: str, nproc: int = 1, config: str = "smoke") -> list[str]:
        head = ["-m", "launchers", "local"] if nproc > 1 else ["-m", "stages"]
        tail = ["--nproc", str(nproc)] if nproc > 1 else []
        return [sys.executable, *head, stage, f"configs/{stage}/{config}.yaml", *self.overrides(*more), *tail]

    def run(self, stage: str, *more: str, nproc: int = 1) -> subprocess.CompletedProcess[str]:
        """Run a stage in `nproc` processes to its end; the result has the exit code that the launcher would give."""
        command = self.command(stage, *more)
        if nproc == 1:
            return warm.run(command)
        shared = warm.ENVIRONMENT | {
            "WORLD_SIZE": str(nproc),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
        }
        ranks = [warm.start(command, shared | {"RANK": str(k), "LOCAL_RANK": str(k)}) for k in range(nproc)]
        while not all(rank.poll() == 0 for rank in ranks) and not any(rank.poll() for rank in ranks):
            time.sleep(0.02)
        # As under the launcher: when a rank has failed, the others get a moment and are then ended.
        deadline = time.monotonic() + patience(3)
        while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
            time.sleep(0.02)
        codes = [rank.poll() for rank in ranks]
        for rank in ranks:
            rank.kill()
        output, errors = ("".join(texts) for texts in zip(*(rank.communicate() for rank in ranks), strict=True))
        return subprocess.CompletedProcess(command, blame(code or 0 for code in codes), output, errors)

    def complete(self, stage: str, *more: str, nproc: int = 1) -> Path:
        """Run to the end and return the run's folder."""
        done = self.run(stage, *more, nproc=nproc)
        assert done.returncode == 0, done.stderr
        experiment = next((m.split("=")[1] for m in reversed(more) if m.startswith("run.experiment=")), "smoke")
        return self.runs / experiment / stage


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="session")
def stages(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Stages:
    return Stages(tmp_path_factory.mktemp("runs"), digits)


@pytest.fixture(scope="session")
def chain(stages: Stages) -> Stages:
    """The three smoke stages, run once for all tests."""
    command = [sys.executable, "-m", "launchers", "local", "chain", "smoke", *stages.overrides()]
    done = warm.run(command)
    assert done.returncode == 0, done.stderr
    assert f"report: {stages.runs / 'smoke' / 'report.html'}" in done.stdout
    return stages
