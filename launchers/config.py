"""The schema of a SLURM cluster's preset, `configs/cluster/*.yaml` (torch-free)."""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from pipeline.config import NonNegativeInt, PositiveInt, Strict

_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<hours>\d{1,3}):(?P<minutes>[0-5]\d):(?P<seconds>[0-5]\d)")


def seconds_of(time: str) -> int:
    """Read a time of SLURM, `H:MM:SS` or `D-HH:MM:SS`, as seconds.

    Raises:
        ValueError: The text has another form. A bare number is refused: SLURM reads minutes, and people mean seconds.
    """
    match = _TIME.fullmatch(time)
    if match is None:
        raise ValueError("give a time as H:MM:SS or D-HH:MM:SS, for example 12:00:00 or 2-00:00:00")
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((24 * days + hours) * 60 + minutes) * 60 + seconds


def _checked_time(time: str) -> str:
    if seconds_of(time) < 60:
        raise ValueError("SLURM counts in minutes, and a job of zero minutes never starts; give 0:01:00 or more")
    return time


class ClusterConfig(Strict):
    """What a job asks SLURM for. One task is one rank, with one GPU or none; `nodes` x `tasks_per_node` is the world size."""

    partition: str | None = Field(
        None, description="partition, or several with commas, of which SLURM takes one; null = the cluster's default"
    )
    account: str | None = Field(None, description="account that is charged; null = your default account")
    qos: str | None = Field(None, description="quality of service; null = the default")
    constraint: str | None = Field(None, description="features that the nodes must have, for example a100; null = any")
    nodes: PositiveInt = Field(1, description="number of nodes")
    gpus_per_node: NonNegativeInt = Field(0, description="GPUs of each node; 0 = train on CPUs")
    gpu: Literal["a100", "h100", "h200"] = Field(
        "a100", description="which GPU the plan counts for; the nodes between them are taken as those of A100s"
    )
    tasks_per_node: PositiveInt | None = Field(
        None, description="ranks on each node; null = one per GPU, or a single one without GPUs"
    )
    cpus_per_task: PositiveInt = Field(
        1, description="CPUs of each rank and its data workers, which are never more than these"
    )
    exclusive: bool = Field(
        False, description="take whole nodes, so that no other job uses their CPUs, memory and network cards"
    )
    memory_gb: NonNegativeInt = Field(0, description="memory of each node in GB; 0 = all of it")
    device_memory_gb: float | None = Field(
        None,
        gt=0,
        le=10**6,
        description="memory of one GPU in GB (10^9 bytes), which the plan compares with the need of a rank; null = not compared",
    )
    time: Annotated[str, AfterValidator(_checked_time)] = Field(
        description="time limit of one start, H:MM:SS or D-HH:MM:SS"
    )
    signal_seconds: PositiveInt = Field(
        120,
        description="seconds before the time limit at which the ranks are told to save; SLURM may be a minute early",
    )
    max_requeues: NonNegativeInt = Field(30, description="how often one job is requeued; after that it ends with 75")
    array_parallel: PositiveInt = Field(8, description="points of a sweep that run at the same time")
    shared: tuple[Path, ...] = Field(
        (),
        description="folders that every node sees; run.root, data, parents and weights must lie below one of them; empty ="
        " not checked",
    )
    setup: tuple[str, ...] = Field(
        (), description="shell lines that run before the ranks, for example module load cuda"
    )
    extra: dict[str, str] = Field(default_factory=dict, description="further options of sbatch, as name: value")

    @property
    def ranks_per_node(self) -> int:
        """The number of ranks on each node."""
        return self.tasks_per_node or max(1, self.gpus_per_node)

    @property
    def world_size(self) -> int:
        """The number of ranks on all nodes."""
        return self.nodes * self.ranks_per_node
