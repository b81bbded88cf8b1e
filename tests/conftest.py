"""What the tests share: the bundled digits as shards, and runs of real processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


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
        return subprocess.run(
            self.command(stage, *more, nproc=nproc),
            cwd=ROOT,
            capture_output=True,
            text=True,
            env=ENVIRONMENT,
            check=False,
        )

    def complete(self, stage: str, *more: str, nproc: int = 1) -> Path:
        """Run to the end and return the run's folder."""
        done = self.run(stage, *more, nproc=nproc)
        assert done.returncode == 0, done.stderr
        experiment = next((m.split("=")[1] for m in reversed(more) if m.startswith("run.experiment=")), "smoke")
        return self.runs / experiment / stage


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


@pytest.fixture(scope="session")
def stages(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Stages:
    return Stages(tmp_path_factory.mktemp("runs"), digits)


@pytest.fixture(scope="session")
def chain(stages: Stages) -> Stages:
    """The three smoke stages, run once for all tests."""
    command = [sys.executable, "-m", "launchers", "local", "chain", "smoke", *stages.overrides()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stderr
    assert f"report: {stages.runs / 'smoke' / 'report.html'}" in done.stdout
    return stages
