"""A rank's share of its node: how many ranks there are, its CPUs, and the socket of its GPU."""

from pathlib import Path

import pytest

from pipeline.files import NETWORK
from pipeline.train.node import cores_of_rank, cpus_of_socket, ranks_here


@pytest.mark.parametrize(
    ("environment", "ranks"),
    [
        ({}, 1),
        ({"LOCAL_WORLD_SIZE": "8"}, 8),
        ({"LOCAL_SIZE": "4"}, 4),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x64)", "SLURM_NODEID": "63"}, 8),
        ({"SLURM_STEP_TASKS_PER_NODE": "2,1", "SLURM_NODEID": "1"}, 1),
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x3),4", "SLURM_NODEID": "3"}, 4),
        ({"LOCAL_WORLD_SIZE": "many", "SLURM_NODEID": "0"}, 1),
    ],
)
def test_ranks_of_a_node_from_every_launcher(environment: dict[str, str], ranks: int) -> None:
    assert ranks_here(environment) == ranks


def test_ranks_share_the_cpus_unless_slurm_counts_them_per_task() -> None:
    assert cores_of_rank({"LOCAL_WORLD_SIZE": "8"}, allowed=128) == 16
    assert cores_of_rank({"LOCAL_WORLD_SIZE": "8"}, allowed=4) == 1
    srun = {"SLURM_STEP_NUM_TASKS": "16", "WORLD_SIZE": "16", "SLURM_CPUS_PER_TASK": "12"}
    assert cores_of_rank(srun, allowed=96) == 12
    assert cores_of_rank(srun, allowed=6) == 6
    # torchrun inside one task of srun: its ranks share the task's CPUs.
    inside = {"SLURM_STEP_NUM_TASKS": "2", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8", "SLURM_CPUS_PER_TASK": "96"}
    assert cores_of_rank(inside, allowed=96) == 12


@pytest.fixture
def system(tmp_path: Path) -> Path:
    """Two sockets of four CPUs, with a GPU on the second."""
    for cpu in range(8):
        topology = tmp_path / f"devices/system/cpu/cpu{cpu}/topology"
        topology.mkdir(parents=True)
        (topology / "physical_package_id").write_text(f"{cpu // 4}\n")
    gpu = tmp_path / "bus/pci/devices/0000:3b:00.0"
    gpu.mkdir(parents=True)
    (gpu / "local_cpulist").write_text("6-7\n")
    return tmp_path


def test_a_rank_keeps_to_the_socket_of_its_gpu(system: Path) -> None:
    everything, second = set(range(8)), {4, 5, 6, 7}
    assert cpus_of_socket(everything, 0, 2, "0000:3b:00.0", system) == second
    assert cpus_of_socket({0, 1, 5, 6}, 0, 2, "0000:3b:00.0", system) == {5, 6}
    assert cpus_of_socket(everything, 0, 2, "0000:ff:00.0", system) == set()  # the system does not know that GPU


def test_without_gpus_the_ranks_are_spread_over_the_sockets(system: Path) -> None:
    chosen = [cpus_of_socket(range(8), rank, 4, None, system) for rank in range(4)]
    assert chosen == [{0, 1, 2, 3}, {0, 1, 2, 3}, {4, 5, 6, 7}, {4, 5, 6, 7}]


def test_one_rank_one_socket_or_an_unknown_machine_are_left_alone(system: Path, tmp_path: Path) -> None:
    assert cpus_of_socket(range(8), 0, 1, None, system) == set()
    assert cpus_of_socket(range(4), 1, 2, None, system) == set()
    assert cpus_of_socket(range(8), 0, 2, None, tmp_path / "nowhere") == set()


def test_built_kernels_do_not_lie_on_a_network() -> None:
    assert all(NETWORK.fullmatch(kind) for kind in ("nfs4", "lustre", "gpfs", "beegfs", "fuse.sshfs"))
    assert not any(NETWORK.fullmatch(kind) for kind in ("ext4", "xfs", "overlay", "tmpfs", "btrfs", "fuseblk"))
