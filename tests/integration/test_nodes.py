"""Several machines without SLURM: two of them, each with an address of its own, meet through torchrun or DeepSpeed's hostfile.

They are two loopback addresses of this machine; one rank each. The end must be that of two processes of one machine.
"""

import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.conftest import ENVIRONMENT, ROOT, Stages

ADDRESSES = ("127.0.0.1", "127.0.0.2")


@pytest.fixture(scope="module")
def straight(stages: Stages) -> bytes:
    return weights(stages.complete("arm", "run.experiment=onemachine", nproc=2))


def weights(run: Path) -> bytes:
    return (run / "export/model.safetensors").read_bytes()


def run_on_both(commands: Sequence[Sequence[str]]) -> list[tuple[int, str]]:
    """Start a command per machine; their exit codes and what they said."""
    kinds = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    processes = [subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, **kinds) for command in commands]
    return [(process.wait(), process.communicate()[0]) for process in processes]


def free_port() -> int:
    with socket.socket() as s:
        s.bind((ADDRESSES[0], 0))
        return s.getsockname()[1]


def test_torchrun_with_a_rendezvous(stages: Stages, straight: bytes) -> None:
    meeting = f"--rdzv-backend c10d --rdzv-endpoint {ADDRESSES[0]}:{free_port()} --rdzv-id torchrun-arm"
    head = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", *meeting.split()]
    stage = ["-m", "stages", "arm", "configs/arm/smoke.yaml", *stages.overrides("run.experiment=torchrun")]
    for code, text in run_on_both([[*head, "--local-addr", address, *stage] for address in ADDRESSES]):
        assert code == 0, text
    assert weights(stages.runs / "torchrun" / "arm") == straight


def test_deepspeed_with_a_hostfile(stages: Stages, straight: bytes, tmp_path: Path) -> None:
    """Started on each node by hand; with ssh between them the first node's command starts the others."""
    hosts = tmp_path / "hosts"
    hosts.write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
    meeting = f"--master_addr {ADDRESSES[0]} --master_port {free_port()} --no_local_rank --no_ssh --node_rank"
    launcher = Path(sys.executable).with_name("deepspeed")
    head = [sys.executable, str(launcher), "--hostfile", str(hosts), *meeting.split()]
    stage = ["--module", "stages", "arm", "configs/arm/smoke.yaml", *stages.overrides("run.experiment=hostfile")]
    for code, text in run_on_both([[*head, str(rank), *stage] for rank in range(2)]):
        assert code == 0, text
    assert weights(stages.runs / "hostfile" / "arm") == straight
