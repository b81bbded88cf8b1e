"""How a process finds its rank: from torchrun, from srun, alone, or in a contradiction; and what ranks agree on."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pipeline.errors import EnvironmentProblem
from pipeline.ops import choice
from pipeline.train.distributed import World, agree_on_scan, gpu_of
from pipeline.train.rendezvous import NAMES, first_host, rendezvous
from tests.ranks import run_ranks

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
SRUN = {
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
    "SLURM_JOB_ID": "1234567",
}


def test_torchruns_names_are_taken_as_they_are() -> None:
    assert rendezvous({**TORCHRUN, "HOME": "/"}) == TORCHRUN


def test_srun_alone_is_enough_and_the_port_follows_from_the_job() -> None:
    found = rendezvous(SRUN)
    port = str(20_000 + 1234567 * 37 % 12_000)
    assert found == {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu03", "MASTER_PORT": port}
    assert rendezvous({**SRUN, "SLURM_RESTART_COUNT": "1"})["MASTER_PORT"] == str(int(port) + 1)


def test_nothing_is_a_world_of_one() -> None:
    assert {k: rendezvous({})[k] for k in NAMES[:3]} == {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}


def test_a_shell_inside_an_allocation_is_a_world_of_one() -> None:
    assert rendezvous({"SLURM_NTASKS": "16", "SLURM_JOB_ID": "7"})["WORLD_SIZE"] == "1"


def test_sixteen_tasks_that_each_believe_to_be_alone_are_refused() -> None:
    with pytest.raises(EnvironmentProblem, match="srun started 16 tasks but WORLD_SIZE is 1"):
        rendezvous({**SRUN, **TORCHRUN, "WORLD_SIZE": "1"})


def test_half_of_torchruns_names_is_refused() -> None:
    with pytest.raises(EnvironmentProblem, match="gives RANK but not WORLD_SIZE"):
        rendezvous({"RANK": "0"})


def test_a_rank_that_is_not_its_task_is_refused() -> None:
    both = {**SRUN, **TORCHRUN, "WORLD_SIZE": SRUN["SLURM_NTASKS"], "RANK": SRUN["SLURM_PROCID"]}
    assert rendezvous(both)["RANK"] == SRUN["SLURM_PROCID"]
    other = {**both, "RANK": str(int(SRUN["SLURM_PROCID"]) - 1)}
    with pytest.raises(EnvironmentProblem, match="all tasks would take the same rank; unset RANK"):
        rendezvous(other)
    assert rendezvous({**other, "TORCHELASTIC_RUN_ID": "x"})["RANK"] == other["RANK"]


@pytest.mark.parametrize(
    ("nodes", "first"), [("n1", "n1"), ("n1,n2", "n1"), ("gpu[003-007,9],cpu1", "gpu003"), ("a-b[2,4]", "a-b2")]
)
def test_the_first_host_of_a_node_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_a_rank_without_a_gpu_is_refused_in_a_sentence() -> None:
    assert gpu_of(3, 8, {}) == 3
    assert gpu_of(3, 1, {"SLURM_PROCID": "3"}) == 0
    with pytest.raises(EnvironmentProblem, match="local rank 1 has no GPU: 1 are visible"):
        gpu_of(1, 1, {})


def rank_with_its_own_taste(rank: int, folder: str) -> None:
    """Each rank would prefer another implementation of the scan, as timing could make it."""
    os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    first = ("torch", "reference")[rank]
    choice.SCANS = {first: choice.SCANS[first], **choice.SCANS}
    agree_on_scan(World(rank, 2, torch.device("cpu")))
    (Path(folder) / f"rank{rank}").write_text(choice.operators_for(torch.ones(1)).name)
    dist.destroy_process_group()


def test_all_ranks_use_the_scan_that_rank_0_chooses(tmp_path: Path) -> None:
    run_ranks(rank_with_its_own_taste, str(tmp_path))
    assert [(tmp_path / f"rank{rank}").read_text() for rank in range(2)] == ["torch", "torch"]
