"""The process group, from the environment. Environment variables are read in this file only.

torchrun, DeepSpeed's launcher, `python -m launchers` and submitit name RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
MASTER_PORT; plain srun names SLURM_PROCID and the like, from which the same follow, the port from the job's id. None of
either is a world of one. Contradictions are refused: sixteen tasks that each believe to be alone train sixteen models.
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
    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def rendezvous(environment: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT of this process. Raises EnvironmentProblem if they contradict."""
    given = {name: environment[name] for name in NAMES if name in environment}
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))  # of the srun step, not of the allocation around a shell
    if len(given) == len(NAMES):
        if tasks > 1 and int(given["WORLD_SIZE"]) % tasks:
            raise EnvironmentProblem(
                f"srun started {tasks} tasks but WORLD_SIZE is {given['WORLD_SIZE']}: every task would train alone or wait for"
                " ever; unset RANK and WORLD_SIZE, or start one task per node with torchrun inside"
            )
        place = environment.get("SLURM_PROCID", given["RANK"])
        # torchrun numbers its processes as they come, whatever srun calls them.
        if (
            tasks == int(given["WORLD_SIZE"]) > 1
            and place != given["RANK"]
            and "TORCHELASTIC_RUN_ID" not in environment
        ):
            raise EnvironmentProblem(
                f"RANK is {given['RANK']} in srun's task {place} of {tasks}: all tasks would take the same place; unset RANK"
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
    """Alike on all nodes and another at each start of a requeued job, so that ranks of two starts never meet; below the
    range from which Linux hands out ports."""
    starts = int(environment["SLURM_JOB_ID"]) * 37 + int(environment.get("SLURM_RESTART_COUNT", "0"))
    return 20_000 + starts % 12_000


def first_host(nodes: str) -> str:
    """The first name of SLURM's node list: `gpu[003-007,9],cpu1` -> `gpu003`."""
    match = re.match(r"([^,\[]+)(?:\[([^,\-\]]+))?", nodes)
    if match is None:
        raise EnvironmentProblem(f"{nodes!r} is no node list of SLURM")
    return match.group(1) + (match.group(2) or "")


def start(timeout_seconds: float) -> World:
    """Join the process group through DeepSpeed: NCCL on GPUs, gloo elsewhere; a collective may take `timeout_seconds`."""
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
    """Index of this rank's GPU among the visible ones. Raises EnvironmentProblem if there are fewer than ranks."""
    if local_rank < visible:
        return local_rank
    if visible == 1 and "SLURM_PROCID" in environment:  # srun --gpus-per-task=1 shows each task its own
        return 0
    raise EnvironmentProblem(
        f"local rank {local_rank} has no GPU: {visible} are visible to this process; start as many processes as GPUs"
        " (--nproc), or hide the GPUs with CUDA_VISIBLE_DEVICES= to train on the CPU"
    )


def limit_collectives(timeout_seconds: float) -> None:
    """Give every process group the time-out: DeepSpeed makes groups of its own, with torch's half hour."""
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_seconds), group)


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def any_rank(flag: bool, world: World) -> bool:
    """True on all ranks if it is true on one (collective)."""
    if world.size == 1:
        return flag
    vote = torch.tensor([float(flag)], device=world.device)
    dist.all_reduce(vote, op=dist.ReduceOp.MAX)
    return bool(vote.item())


def is_communication_failure(error: BaseException) -> bool:
    """Whether an exception says that another rank is gone or silent. Gloo raises plain RuntimeErrors."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(
        word in text for word in ("gloo", "NCCL", "Connection closed by peer")
    )


def _log_table(world: World, backend: str, found: Mapping[str, str]) -> None:
    """One line a rank, on rank 0: who is where."""
    if world.size == 1:
        return
    places: list[str] = [""] * world.size
    dist.all_gather_object(places, f"{socket.gethostname()} {world.device} pid {os.getpid()}")
    logger.info("%d processes, %s, %s:%s", world.size, backend, found["MASTER_ADDR"], found["MASTER_PORT"])
    for rank, place in enumerate(places):
        logger.info("  rank %d: %s", rank, place)


def _import_deepspeed() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # FutureWarnings of its own imports
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
    # start for no gain; reading the table instead of setting it would probe every operator with the compiler.
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    return deepspeed
