"""Who can reach a run: the sockets that real runs listen on, and what a silent, absent or public peer ends in."""

import os
import socket
import subprocess
import sys
import time

import pytest

from tests.conftest import ENVIRONMENT, ROOT, Stages
from tests.integration.listening import watch


@pytest.mark.parametrize("nproc", [1, 2])
def test_a_run_on_one_machine_listens_on_the_loopback_only(stages: Stages, nproc: int) -> None:
    command = stages.command("arm", f"run.experiment=listens{nproc}", nproc=nproc)
    code, said, addresses = watch(command, 300, cwd=ROOT, env=ENVIRONMENT)
    assert code == 0, said
    assert addresses <= {"127.0.0.1", "::1"}
    assert addresses, "gloo listens somewhere; otherwise this test saw nothing"


def finished(command: list[str], env: dict[str, str], timeout: float) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command, cwd=ROOT, env=env, timeout=timeout, capture_output=True, text=True, check=False)


def of_two(rank: int, **more: str) -> dict[str, str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    return {**ENVIRONMENT, **ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **more}


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_whose_peer_never_comes_ends_with_7_after_the_time_out(stages: Stages, rank: int) -> None:
    begin = time.monotonic()
    command = stages.command("arm", f"run.experiment=alone{rank}", "engine.timeout_seconds=2")
    ended = finished(command, env=of_two(rank), timeout=120)
    assert ended.returncode == 7, ended.stderr
    assert "lost another rank" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert time.monotonic() - begin < 60


def test_a_port_that_is_taken_is_told(stages: Stages) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        ended = finished(stages.command("arm", "run.experiment=taken"), env=of_two(0, MASTER_PORT=port), timeout=120)
    assert ended.returncode == 5, ended.stderr
    assert f"error: port {port} of 127.0.0.1 is taken by another process; set MASTER_PORT" in ended.stderr


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"MASTER_ADDR": "8.8.8.8"}, "an address of the internet"),
        ({"RANK": "x"}, "RANK is 'x', but it must be a number from 0 to 1"),
        ({"RANK": "2"}, "RANK is '2', but it must be"),
        ({"WORLD_SIZE": "²"}, "WORLD_SIZE is '²', but it must be"),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE is '999"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT is '70000', but it must be a number from 1 to 65535"),
        ({"LOCAL_RANK": ""}, "LOCAL_RANK is '', but"),
        ({"SLURM_STEP_NUM_TASKS": "many"}, "SLURM_STEP_NUM_TASKS is 'many', but"),
    ],
)
def test_garbage_of_a_launcher_ends_with_5_in_one_sentence(
    stages: Stages, variables: dict[str, str], said: str
) -> None:
    ended = finished(stages.command("arm", "run.experiment=garbage"), env=of_two(0, **variables), timeout=120)
    assert ended.returncode == 5, ended.stderr
    assert said in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1


def test_without_a_home_a_process_starts() -> None:
    code = "from pipeline.ops.native.build import cache_folder; print(cache_folder())"
    environment = {name: value for name, value in os.environ.items() if name != "HOME"} | {"HOME": "/nowhere/at/all"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
