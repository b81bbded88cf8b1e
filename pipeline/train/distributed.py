"""The process group, from the environment.

torchrun, DeepSpeed's launcher, `python -m launchers` and submitit set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
MASTER_PORT. Plain srun sets SLURM_PROCID and the like, from which the same five follow (the port from the job's id).
Without either, the world has one process. Contradictions are refused: sixteen tasks of which each takes itself for the
only one would train sixteen models.
"""

import importlib
import logging
import os
import re
import socket
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from types import ModuleType
from unittest import mock

import torch
import torch.distributed as dist

from pipeline.errors import EnvironmentProblem

logger = logging.getLogger(__name__)

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_SLURM = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP_NODELIST", "SLURM_JOB_ID")


@dataclass(frozen=True)
class World:
    """This process among those that train together.

    Args:
        rank: Number of this process, from 0.
        size: Number of processes.
        device: Where this process computes.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes what is written once."""
        return self.rank == 0


def rendezvous(environment: Mapping[str, str]) -> dict[str, str]:
    """Return RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT of this process.

    Raises:
        EnvironmentProblem: If the variables contradict one another.
    """
    given = {name: environment[name] for name in NAMES if name in environment}
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))  # the srun step's, not the allocation's around a shell
    if len(given) == len(NAMES):
        if tasks > 1 and int(given["WORLD_SIZE"]) % tasks:
            raise EnvironmentProblem(
                f"srun started {tasks} tasks but WORLD_SIZE is {given['WORLD_SIZE']}: every task would train alone or wait for"
                " ever; unset RANK and WORLD_SIZE, or start one task per node with torchrun inside"
            )
        place = environment.get("SLURM_PROCID", given["RANK"])
        # torchrun numbers its processes in the order in which they arrive, not by srun's numbers.
        if (
            tasks == int(given["WORLD_SIZE"]) > 1
            and place != given["RANK"]
            and "TORCHELASTIC_RUN_ID" not in environment
        ):
            raise EnvironmentProblem(
                f"RANK is {given['RANK']} in srun's task {place} of {tasks}: all tasks would take the same rank; unset RANK"
            )
        return given
    if given and tasks == 1:
        missing = [name for name in NAMES if name not in given]
        raise EnvironmentProblem(
            f"the environment gives {', '.join(given)} but not {', '.join(missing)};"
            " start with `python -m launchers local` or torchrun, or unset them for one process"
        )
    if tasks > 1:
        absent = [name for name in _SLURM if name not in environment]
        if absent:
            raise EnvironmentProblem(
                f"srun started {tasks} tasks but {', '.join(absent)} is not set; start with srun or torchrun"
            )
        return {
            "RANK": environment["SLURM_PROCID"],
            "WORLD_SIZE": environment["SLURM_NTASKS"],
            "LOCAL_RANK": environment["SLURM_LOCALID"],
            "MASTER_ADDR": first_host(environment["SLURM_STEP_NODELIST"]),
            "MASTER_PORT": str(_port(environment)),
        }
    return {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",  # any free one
    }


def _port(environment: Mapping[str, str]) -> int:
    """A port that is equal on all nodes and differs between the starts of a requeued job, so that their ranks never meet.

    It lies below the range from which Linux hands out ports.
    """
    starts = int(environment["SLURM_JOB_ID"]) * 37 + int(environment.get("SLURM_RESTART_COUNT", "0"))
    return 20_000 + starts % 12_000


def first_host(nodes: str) -> str:
    """Return the first name of SLURM's node list: `gpu[003-007,9],cpu1` -> `gpu003`."""
    match = re.match(r"([^,\[]+)(?:\[([^,\-\]]+))?", nodes)
    if match is None:
        raise EnvironmentProblem(f"{nodes!r} is not a node list of SLURM; expected one such as gpu[003-007,9],cpu1")
    return match.group(1) + (match.group(2) or "")


def start(timeout_seconds: float) -> World:
    """Join the process group through DeepSpeed, with NCCL on GPUs and gloo elsewhere.

    Args:
        timeout_seconds: How long a collective may take before it fails.
    """
    found = rendezvous(os.environ)
    os.environ.update(found)
    gpus = torch.cuda.is_available()
    device = torch.device("cpu")
    if gpus:
        device = torch.device("cuda", gpu_of(int(found["LOCAL_RANK"]), torch.cuda.device_count(), os.environ))
        torch.cuda.set_device(device)
    if not gpus:
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    deepspeed = _import_deepspeed()
    backend = "nccl" if gpus else "gloo"
    deepspeed.init_distributed(dist_backend=backend, verbose=False, timeout=timedelta(seconds=timeout_seconds))
    world = World(dist.get_rank(), dist.get_world_size(), device)
    _log_table(world, backend, found)
    return world


def gpu_of(local_rank: int, visible: int, environment: Mapping[str, str]) -> int:
    """Return the index of this rank's GPU among the visible ones.

    Args:
        local_rank: Number of this process on its node.
        visible: Number of GPUs that this process sees.
        environment: The environment variables.

    Raises:
        EnvironmentProblem: If there are fewer GPUs than ranks.
    """
    if local_rank < visible:
        return local_rank
    if visible == 1 and "SLURM_PROCID" in environment:  # srun --gpus-per-task=1 shows each task its own
        return 0
    raise EnvironmentProblem(
        f"local rank {local_rank} has no GPU: {visible} are visible to this process; start as many processes as GPUs"
        " (--nproc), or hide the GPUs with CUDA_VISIBLE_DEVICES= to train on the CPU"
    )


def limit_collectives(timeout_seconds: float) -> None:
    """Set the time-out of every process group; DeepSpeed makes groups of its own, with torch's half hour."""
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_seconds), group)


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def any_rank(flag: bool, world: World) -> bool:
    """Return whether the flag is true on at least one rank (collective)."""
    if world.size == 1:
        return flag
    vote = torch.tensor([float(flag)], device=world.device)
    dist.all_reduce(vote, op=dist.ReduceOp.MAX)
    return bool(vote.item())


def barrier(world: World) -> None:
    """Wait until every rank is here (collective)."""
    any_rank(False, world)


def is_communication_failure(error: BaseException) -> bool:
    """Return whether an exception says that another rank is gone or silent; gloo raises plain RuntimeErrors."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(
        word in text for word in ("gloo", "NCCL", "Connection closed by peer")
    )


def _log_table(world: World, backend: str, found: Mapping[str, str]) -> None:
    """Log on rank 0 where each rank runs."""
    if world.size == 1:
        return
    places: list[str] = [""] * world.size
    dist.all_gather_object(places, f"{socket.gethostname()} {world.device} pid {os.getpid()}")
    logger.info("%d processes, %s, %s:%s", world.size, backend, found["MASTER_ADDR"], found["MASTER_PORT"])
    for rank, place in enumerate(places):
        logger.info("  rank %d: %s", rank, place)


def _import_deepspeed() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own imports raise FutureWarnings
        try:
            import deepspeed

            # DeepSpeed imports its Muon optimizer, which nobody here uses, and Muon's decorators call torch.compile: that
            # loads all of inductor, seconds at every start. Without effect where a model is compiled later.
            with mock.patch.object(torch, "compile", lambda function=None, **_: function or (lambda f: f)):
                importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
        except ImportError as error:
            raise EnvironmentProblem(
                f"DeepSpeed cannot be imported ({error}); pip install -r requirements.txt"
            ) from None
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Nothing of DeepSpeed's own is compiled. Its shared-memory all-reduce would take half a minute and g++ at the first
    # start for no gain; reading the table instead of setting it would try the compiler on every operator.
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    return deepspeed
