"""What a cluster would accept and never run, or run in the wrong place, is refused with a sentence before submission."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.slurm.conftest import Person


@pytest.mark.parametrize(
    ("more", "code", "sentence"),
    [
        (
            ["cluster:partition=gpuu"],
            2,
            "the cluster has no partition 'gpuu'; give cluster:partition=NAME, one of main, urgent, closed",
        ),
        (["cluster:partition='main,gpuu'"], 2, "the cluster has no partition 'gpuu'"),
        (["cluster:partition=closed"], 2, "above the limit 00:00:00 of partition closed"),
        (["cluster:time=72:00"], 2, "give a time as H:MM:SS or D-HH:MM:SS"),
        (["cluster:time=9-00:00:00"], 2, "above the limit 7-00:00:00 of partition main"),
        (["cluster:nodes=4", "cluster:tasks_per_node=1"], 2, "cluster:nodes is 4, but partition main has 2"),
        (["cluster:tasks_per_node=4"], 2, "virtual_readers 4 must be a multiple of the 8 processes"),
        (["cluster:shared=[/nowhere]"], 2, "is not on a file system that the nodes share (/nowhere)"),
        (["run.root=/dev/shm/runs"], 2, "run.root = /dev/shm/runs is in the memory of this machine (tmpfs)"),
        (["cluster:extra={qos: none-such, gres: 'fpga:1'}"], 5, "SLURM refuses the job"),
        (["cluster:nods=2"], 2, "unknown key; did you mean 'nodes'?"),
    ],
)
def test_refused_with_a_sentence_and_nothing_in_the_queue(
    person: Person, more: list[str], code: int, sentence: str
) -> None:
    done = person.slurm("arm", "configs/arm/smoke.yaml", "run.experiment=refused", *more)
    assert done.returncode == code, done.stderr
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    queued = subprocess.run(["squeue", "-h", "-n", "refused-arm"], capture_output=True, text=True, check=True)
    assert queued.stdout == ""


def test_a_shell_that_torchrun_made_is_no_place_to_submit_from(person: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    import tests.slurm.conftest as here

    monkeypatch.setattr(here, "ENVIRONMENT", here.ENVIRONMENT | {"RANK": "0", "WORLD_SIZE": "1"})
    done = person.slurm("arm", "configs/arm/smoke.yaml", "run.experiment=refused")
    assert done.returncode == 5
    assert "unset RANK WORLD_SIZE" in done.stderr


def test_where_there_is_no_slurm_it_says_so(person: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    import tests.slurm.conftest as here

    python = Path(os.sys.executable).parent
    monkeypatch.setattr(here, "ENVIRONMENT", here.ENVIRONMENT | {"PATH": str(python)})
    done = person.slurm("arm", "configs/arm/smoke.yaml", "run.experiment=refused")
    assert done.returncode == 5
    assert "there is no sbatch here" in done.stderr
