"""The process group, from the environment.

torchrun, DeepSpeed's launcher, `python -m launchers` and submitit set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
MASTER_PORT. Plain srun sets SLURM_PROCID and the like, from which the same five follow (the port from the job's id).
Without either, the world has one process. Contradictions are refused: sixteen tasks of which each takes itself for the
only one would train sixteen models. Nothing here listens on more addresses than the ranks need (`rendezvous.py`).
"""

import importlib
import logging
import os
import socket
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import ModuleType
from typing import Any, TypeVar
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.errors import EnvironmentProblem
from pipeline.ops.arithmetic import choose_arithmetic
from pipeline.ops.choice import choose_scan
from pipeline.train import host_memory, node
from pipeline.train.gpus import Torch, broken_promise
from pipeline.train.rendezvous import keep_to_the_ranks, open_store, rendezvous
from pipeline.train.shared_sums import SPINS, SharedSums, open_sums

logger = logging.getLogger(__name__)

T = TypeVar("T")
_sums: SharedSums | None = None  # None also where gloo sums
_served: Any = None  # DeepSpeed's backend, which outlives a process group


@dataclass(frozen=True)
class World:
    """This process among those that train together.

    Args:
        rank: Number of this process, from 0.
        size: Number of processes.
        device: Where this process computes.
        local_rank: Number of this process on its node.
    """

    rank: int
    size: int
    device: torch.device
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes what is written once."""
        return self.rank == 0

    @property
    def leads_node(self) -> bool:
        """Whether this is the first rank of its node, which reads and builds what a node needs once."""
        return self.local_rank == 0


def start(timeout_seconds: float, public_address: bool = False, bind_cores: bool = True) -> World:
    """Join the process group through DeepSpeed: tensors on GPUs go through NCCL, those in the host's memory through gloo.

    Without GPUs, ranks of one machine sum through the memory that they share, and so do DeepSpeed's gradients.

    Args:
        timeout_seconds: How long a collective may take, and how long a rank may stay away, before it fails.
        public_address: Whether the ranks may meet at an address of the internet.
        bind_cores: Whether each process keeps to the CPUs of one socket (`node.bind`).

    Raises:
        EnvironmentProblem: The environment contradicts itself, the ranks cannot or may not meet at its address, or GPUs were
            promised and torch sees none.
    """
    found = rendezvous(os.environ)
    keep_to_the_ranks(found, public_address)
    os.environ.update(found)
    gpus = torch.cuda.is_available()
    device = torch.device("cpu")
    if gpus:
        device = torch.device("cuda", gpu_of(int(found["LOCAL_RANK"]), torch.cuda.device_count(), os.environ))
        torch.cuda.set_device(device)
        choose_arithmetic(device)
    else:
        if wrong := broken_promise(Torch(torch.__version__, torch.version.cuda), os.environ):
            raise EnvironmentProblem(wrong)
        os.environ["DS_ACCELERATOR"] = "cpu"
        host_memory.keep_freed()
    own_core = node.has_own_core(os.environ)
    if bind_cores:  # before torch and DeepSpeed start threads, which inherit it
        node.bind(int(found["LOCAL_RANK"]), node.ranks_here(os.environ), _pci_address(device) if gpus else None)
    deepspeed = quiet_deepspeed()
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    timeout = timedelta(seconds=timeout_seconds)
    # A group that exists already is kept: a second stage in one process. Without a store torchrun's own is used.
    store = None if dist.is_initialized() else open_store(found, timeout)
    if store is not None:
        dist.init_process_group(
            backend, store=store, rank=int(found["RANK"]), world_size=int(found["WORLD_SIZE"]), timeout=timeout
        )
    deepspeed.init_distributed(dist_backend=backend, verbose=False, timeout=timeout)
    world = World(dist.get_rank(), dist.get_world_size(), device, int(found["LOCAL_RANK"]))
    if _sums is None and world.size > 1 and not gpus:
        _share_sums(world, timeout_seconds, own_core, deepspeed.comm.comm.cdb)
    _log_table(world, backend, found)
    return world


def _share_sums(world: World, timeout_seconds: float, own_core: bool, backend: Any) -> None:
    """Let the ranks sum through shared memory if they can, and DeepSpeed's `backend` do as they do (collective)."""
    global _sums, _served
    _sums = open_sums(world.rank, world.size, timeout_seconds, spins=SPINS if own_core else 0)
    if backend is _served:
        return
    _served, otherwise = backend, backend.all_reduce

    def all_reduce(tensor: Tensor, op: Any, group: dist.ProcessGroup | None = None, async_op: bool = False) -> Any:
        summed = op.name == "SUM" and not async_op
        if summed and _sums is not None and dist.get_world_size(group) == _sums.size and _sums.serves(tensor):
            return _sums.add(tensor)
        return otherwise(tensor, op, group, async_op)

    backend.all_reduce = all_reduce


def sum_over_ranks(tensor: Tensor) -> None:
    """Replace a tensor by its sum over all ranks (collective); without a process group it stays as it is."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    if _sums is not None and _sums.serves(tensor):
        _sums.add(tensor)
    else:
        dist.all_reduce(tensor)


def average_over_ranks(tensors: Sequence[Tensor]) -> bool:
    """Replace tensors by their means over all ranks where nothing must be copied for it (collective).

    Returns:
        Whether it was done. It is not where the ranks do not share memory, and for tensors that shared memory does not serve.
    """
    if dist.get_world_size() == 1:
        return True
    if _sums is None or not _sums.serves(*tensors):
        return False
    _sums.add(*tensors, factor=1 / dist.get_world_size())
    return True


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


def _pci_address(device: torch.device) -> str:
    about: Any = torch.cuda.get_device_properties(device)  # torch's types leave the address out
    return f"{about.pci_domain_id:04x}:{about.pci_bus_id:02x}:{about.pci_device_id:02x}.0"


def agree_on_scan(world: World) -> None:
    """Let all ranks use the implementation of the scan that rank 0 chooses (collective).

    Where two kernels work, each rank would time them for itself, and ranks that differ would round differently.
    """
    chosen = [choose_scan("auto", world.device).name if world.is_main else ""]
    dist.broadcast_object_list(chosen, device=torch.device("cpu"))
    if not world.is_main:
        choose_scan(chosen[0], world.device)


def limit_collectives(timeout_seconds: float) -> None:
    """Set the time-out of every process group; DeepSpeed makes groups of its own, with torch's half hour."""
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_seconds), group)
    if _sums is not None:
        _sums.timeout_seconds = timeout_seconds


def stop() -> None:
    """Leave the process group, if there is one."""
    global _sums
    if _sums is not None:
        _sums.close()
        _sums = None
    if dist.is_initialized():
        dist.destroy_process_group()


def any_rank(flag: bool, world: World) -> bool:
    """Return whether the flag is true on at least one rank (collective).

    The ranks vote in the host's memory by gloo, also where they train on GPUs: a vote on a GPU could be read only after all
    that the GPU still has to compute.
    """
    if world.size == 1:
        return flag
    votes = torch.full((1,), float(flag))
    sum_over_ranks(votes)
    return bool(votes.item())


def barrier(world: World) -> None:
    """Wait until every rank is here (collective)."""
    any_rank(False, world)


def from_main(value: T, world: World) -> T:
    """Return rank 0's value on every rank (collective)."""
    if world.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def from_all(value: T, world: World) -> list[T]:
    """Return the values of all ranks on every rank, in the order of the ranks (collective)."""
    if world.size == 1:
        return [value]
    box = [value] * world.size
    dist.all_gather_object(box, value)
    return box


def gather_uneven(own: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Return the numbers of every rank, (sizes[rank],) each, of which `own` are this rank's (collective).

    One collective of equal rows, which are padded: NCCL and gloo gather no others at once.
    """
    row = own.new_zeros(max(sizes))
    row[: len(own)] = own
    gathered = row.new_empty(len(sizes) * len(row))
    dist.all_gather_into_tensor(gathered, row)
    return [found[:size] for found, size in zip(gathered.chunk(len(sizes)), sizes, strict=True)]


def to_main(value: T, world: World) -> list[T]:
    """Return the values of all ranks on rank 0, and an empty list elsewhere (collective)."""
    if world.size == 1:
        return [value]
    box = [value] * world.size if world.is_main else None
    dist.gather_object(value, box, dst=0)
    return box or []


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


def quiet_deepspeed() -> ModuleType:
    """Import DeepSpeed without its messages and without what nobody here uses.

    Raises:
        EnvironmentProblem: It cannot be imported.
    """
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
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
