"""A SLURM cluster as values (torch-free): what `configs/cluster/*.yaml` may say. One task is one rank, with one GPU or none."""

import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt

from pipeline.config import Strict

_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<hours>\d{1,3}):(?P<minutes>[0-5]\d):(?P<seconds>[0-5]\d)")


def seconds_of(time: str) -> int:
    """Of SLURM's `H:MM:SS` or `D-HH:MM:SS`. Raises ValueError for anything else: a bare number is minutes to SLURM and
    seconds to people."""
    match = _TIME.fullmatch(time)
    if match is None:
        raise ValueError("a time is H:MM:SS or D-HH:MM:SS, for example 12:00:00 or 2-00:00:00")
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((24 * days + hours) * 60 + minutes) * 60 + seconds


def _checked_time(time: str) -> str:
    if seconds_of(time) < 60:
        raise ValueError("SLURM counts in minutes, and a time of zero waits for ever: give one at least")
    return time


class ClusterConfig(Strict):
    """What a job asks for. `nodes` x `tasks_per_node` is the world size."""

    partition: str | None = Field(None, description="none = the cluster's default")
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    nodes: PositiveInt = 1
    gpus_per_node: NonNegativeInt = 0
    tasks_per_node: PositiveInt | None = Field(None, description="ranks of a node; none = one a GPU, or one")
    cpus_per_task: PositiveInt = Field(1, description="for a rank and its data workers")
    memory_gb: NonNegativeInt = Field(0, description="of a node; 0 = all of it")
    device_memory_gb: PositiveFloat | None = Field(
        None, description="of one GPU (10^9 bytes); the plan holds the memory of a rank against it. None: not checked"
    )
    time: Annotated[str, AfterValidator(_checked_time)] = Field(description="limit of one start, H:MM:SS or D-HH:MM:SS")
    signal_seconds: PositiveInt = Field(
        120, description="before the limit, when the ranks are told to save; SLURM may be a minute early"
    )
    max_requeues: NonNegativeInt = Field(30, description="starts of one job beyond the first; then it ends with 75")
    array_parallel: PositiveInt = Field(8, description="points of a sweep that run at once")
    shared: tuple[Path, ...] = Field(
        (),
        description="folders that every node sees; run.root and the data must lie below one. None given: not checked",
    )
    setup: tuple[str, ...] = Field((), description="shell lines before the ranks start, for example module load cuda")
    extra: dict[str, str] = Field(default_factory=dict, description="further options of sbatch, name: value")

    @property
    def ranks_per_node(self) -> int:
        return self.tasks_per_node or max(1, self.gpus_per_node)

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node
