"""Checks of a plan against memory, disk and time limits; each problem says what would help."""

from collections.abc import Iterator, Mapping
from typing import Any

from launchers.config import ClusterConfig
from launchers.plan.text import size
from pipeline.errors import ConfigError, EnvironmentProblem, PipelineError

_HOST = "its share of the node (memory_gb)"


def check_stage(stage: Mapping[str, Any], cluster: ClusterConfig) -> Iterator[PipelineError]:
    """Yield what a stage needs beyond the memory and the time limit that the cluster's preset states.

    Args:
        stage: The stage's entry in the plan.
        cluster: The preset.
    """
    needs = stage["memory"][str(stage["zero_stage"])]
    node = 1e9 * cluster.memory_gb / cluster.ranks_per_node  # 0 = all of it: unknown
    if cluster.gpus_per_node:
        device = 1e9 * (cluster.device_memory_gb or 0)
        memories = [("a GPU (device_memory_gb)", needs["device"], device), (_HOST, needs["host"], node)]
    else:
        memories = [(_HOST, needs["device"] + needs["host"], node)]
    for where, needed, there in memories:
        if 0 < there < needed:
            others = ", ".join(f"ZeRO {z} {size(m['device'] + m['host'])}" for z, m in stage["memory"].items())
            yield ConfigError(
                f"stage {stage['stage']} needs {size(needed)} per rank, but {where} has {size(there)}; lower"
                f" engine.micro_batch, take more ranks, or a higher engine.zero_stage ({others})"
            )
    if not stage["starts"]:
        yield ConfigError(
            f"stage {stage['stage']}: the limit cluster:time={cluster.time} leaves no time for training between a start and"
            f" the signal {cluster.signal_seconds} s before the limit; raise cluster:time"
        )


def check_disk(needed: int, free: int) -> Iterator[PipelineError]:
    """Yield a problem if `needed` bytes are more than the `free` ones."""
    if needed > free:
        yield EnvironmentProblem(
            f"the chain needs {size(needed)} of disk, but {size(free)} are free in run.root; free some space, set another"
            " run.root, or lower loop.keep_checkpoints"
        )
