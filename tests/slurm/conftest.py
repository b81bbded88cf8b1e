"""The cluster, and a person who submits to it."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launchers.queue import JobState
from tests.conftest import ENVIRONMENT, ROOT
from tests.slurm.cluster import WAIT_SECONDS, Cluster, missing


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := missing():
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("slurm") / "lab") as cluster:
        yield cluster


class Person:
    """Types commands in the project's folder and reads what they wrote under one runs folder."""

    def __init__(self, cluster: Cluster, runs: Path, digits: Path) -> None:
        self.cluster, self.runs = cluster, runs
        self.overrides = [f"run.root={runs}", f"data.train={digits / 'train'}", f"data.split={digits / 'split.json'}"]
        self.overrides += [
            f"data.test={digits / 'test'}",
            f"cluster:shared=[{runs}, {digits}]",
            "cluster:partition=main",
        ]

    def type(self, *command: str) -> subprocess.CompletedProcess[str]:
        environment = ENVIRONMENT | {"SLURM_CONF": os.environ["SLURM_CONF"]}
        return subprocess.run(
            [sys.executable, "-m", "launchers", *command],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    def slurm(self, stage: str, config: str, *more: str) -> subprocess.CompletedProcess[str]:
        return self.type("slurm", stage, config, *self.overrides, *more)

    def submit(self, stage: str, config: str, *more: str) -> dict[str, str]:
        """stage -> job id, of what the experiment has in the queue."""
        done = self.slurm(stage, config, *more)
        assert done.returncode == 0, done.stderr
        experiment = next((m.split("=")[1] for m in more if m.startswith("run.experiment=")), "smoke")
        records = (self.runs / experiment / "slurm").glob("*.json")
        return {path.stem: json.loads(path.read_text())["job"] for path in records}

    def steps(self, experiment: str, stage: str) -> int:
        """Logged so far."""
        path = self.runs / experiment / stage / "metrics.jsonl"
        return path.read_text().count("train/loss") if path.exists() else 0

    def until_step(self, experiment: str, stage: str, step: int) -> None:
        self.cluster.until(lambda: self.steps(experiment, stage) >= step, f"step {step} of {experiment}/{stage}")

    def completed(self, job_id: str, seconds: float = WAIT_SECONDS) -> JobState:
        state = self.cluster.ended(job_id, seconds)
        assert state.state == "COMPLETED", f"{state}\n{self.logs(job_id)}"
        return state

    def weights(self, experiment: str, stage: str) -> bytes:
        return (self.runs / experiment / stage / "export/model.safetensors").read_bytes()

    def verdicts(self, experiment: str, job_id: str) -> list[dict[str, Any]]:
        """How each start ended."""
        path = self.runs / experiment / "slurm" / job_id / "verdicts.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]

    def logs(self, job_id: str) -> str:
        paths = sorted(self.runs.glob(f"*/slurm/{job_id}_*_log.*"))
        return "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in paths)


@pytest.fixture(scope="session")
def person(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Person:
    return Person(cluster, tmp_path_factory.mktemp("slurm-runs"), digits)
