"""Where a plan needs more than there is: each a sentence among the plan's problems, with what would help."""

from collections.abc import Iterator, Mapping
from typing import Any

from launchers.config import ClusterConfig
from launchers.plan.text import size
from pipeline.errors import ConfigError, EnvironmentProblem, PipelineError

_HOST = "its share of the node (memory_gb)"


def of_stage(stage: Mapping[str, Any], cluster: ClusterConfig) -> Iterator[PipelineError]:
    """Memory of a device and of a node, as far as the preset tells them; a time limit that leaves no time to work in."""
    needs = stage["memory"][str(stage["zero_stage"])]
    node = 1e9 * cluster.memory_gb / cluster.ranks_per_node  # 0 = all of it: unknown
    if cluster.gpus_per_node:
        device = 1e9 * (cluster.device_memory_gb or 0)
        rooms = [("a GPU (device_memory_gb)", needs["device"], device), (_HOST, needs["host"], node)]
    else:
        rooms = [(_HOST, needs["device"] + needs["host"], node)]
    for where, needed, there in rooms:
        if 0 < there < needed:
            others = ", ".join(f"ZeRO {z} {size(m['device'] + m['host'])}" for z, m in stage["memory"].items())
            yield ConfigError(
                f"{stage['stage']} needs {size(needed)} a rank, and {where} has {size(there)}: lower engine.micro_batch,"
                f" take more ranks, or a higher engine.zero_stage ({others})"
            )
    if not stage["starts"]:
        yield ConfigError(
            f"{stage['stage']}: a limit of {cluster.time} leaves no time to work in after a start and before the signal"
            f" ({cluster.signal_seconds} s): raise cluster:time"
        )


def of_disk(needed: int, free: int) -> Iterator[PipelineError]:
    if needed > free:
        yield EnvironmentProblem(
            f"{size(needed)} of disk are needed and {size(free)} are free where the runs lie: make room, set another"
            " run.root, or lower loop.keep_checkpoints"
        )
