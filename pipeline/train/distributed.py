"""The process group, from the environment: torchrun's names, or a world of one. Environment variables are read here only."""

import os
import socket
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.distributed as dist

from pipeline.errors import EnvironmentProblem

_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def start() -> World:
    """Join the process group through DeepSpeed: NCCL on GPUs, gloo elsewhere.

    Raises EnvironmentProblem for half an environment.
    """
    given = [name for name in _NAMES if name in os.environ]
    if given and len(given) < len(_NAMES):
        missing = [name for name in _NAMES if name not in given]
        raise EnvironmentProblem(
            f"the environment gives {', '.join(given)} but not {', '.join(missing)};"
            " start with `python -m launchers local` or torchrun, or unset them for one process"
        )
    if not given:
        os.environ.update(
            RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port())
        )
    gpus = torch.cuda.is_available()
    if not gpus:
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    deepspeed = _import_deepspeed()
    deepspeed.init_distributed(dist_backend="nccl" if gpus else "gloo", verbose=False)
    local_rank = int(os.environ["LOCAL_RANK"])
    if gpus:
        torch.cuda.set_device(local_rank)
    device = torch.device("cuda", local_rank) if gpus else torch.device("cpu")
    return World(dist.get_rank(), dist.get_world_size(), device)


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


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _import_deepspeed() -> ModuleType:
    import logging
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # FutureWarnings of its own imports
        try:
            import deepspeed
        except ImportError as error:
            raise EnvironmentProblem(
                f"DeepSpeed cannot be imported ({error}); pip install -r requirements.txt"
            ) from None
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Its shared-memory all-reduce would be compiled at the first start (half a minute, and needs g++) for no gain here.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
