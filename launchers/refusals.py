"""What a cluster would accept and never run, or run in the wrong place: refused before anything is submitted."""

import os
from collections.abc import Sequence

from launchers import queue
from launchers.chain import Step
from launchers.config import ClusterConfig, seconds_of
from launchers.filesystem import file_system
from pipeline.errors import ConfigError, EnvironmentProblem

# Of a shell that torchrun or another launcher made: they would be believed in the job.
_WORLD = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_IN_MEMORY = ("tmpfs", "ramfs", "devtmpfs")


def refuse(points: Sequence[Sequence[Step]], cluster: ClusterConfig) -> None:
    """Raises for what SLURM would accept and never run, and for what would run in the wrong place."""
    if not queue.available():
        raise EnvironmentProblem("there is no sbatch here; submit from a login node of a SLURM cluster, or use `local`")
    set_already = [name for name in _WORLD if name in os.environ]
    if set_already:
        raise EnvironmentProblem(
            f"{', '.join(set_already)} would travel from this shell into the job, where srun says who is who;"
            f" unset {' '.join(set_already)}"
        )
    check_partition(cluster)
    for point in points:
        for step in point:
            check_shared(step, cluster)


def check_partition(cluster: ClusterConfig) -> None:
    """Against what the cluster says of itself. Raises ConfigError."""
    rows = [queue.fields(line) for line in queue.ask("scontrol", "-o", "show", "partition").splitlines()]
    known = {row["PartitionName"]: row for row in rows}
    default = next((name for name, row in known.items() if row.get("Default") == "YES"), None)
    name = cluster.partition or default
    if name is None:
        raise ConfigError(
            f"the cluster has no default partition; give cluster:partition=NAME, one of {', '.join(known)}"
        )
    if name not in known:
        raise ConfigError(f"partition {name!r} is unknown to this cluster; it has {', '.join(known)}")
    limit, nodes = known[name].get("MaxTime", "UNLIMITED"), known[name].get("TotalNodes", "")
    if limit not in ("UNLIMITED", "INFINITE") and seconds_of(cluster.time) > seconds_of(limit):
        raise ConfigError(
            f"cluster time {cluster.time} is above the limit of partition {name}, {limit}: the job would wait for ever;"
            f" give cluster:time={limit} or less, requeues do the rest"
        )
    if nodes.isdigit() and cluster.nodes > int(nodes):
        raise ConfigError(
            f"{cluster.nodes} nodes are asked of partition {name}, which has {nodes}; lower cluster:nodes"
        )


def check_shared(step: Step, cluster: ClusterConfig) -> None:
    """Raises ConfigError for a run folder or data that the nodes would not see, as far as it can be known."""
    data = step.config.data
    places = {
        "run.root": step.config.run.root,
        "data.train": data.train,
        "data.split": data.split,
        "data.test": data.test,
    }
    for name, path in places.items():
        if path is not None and file_system(path) in _IN_MEMORY:
            raise ConfigError(
                f"{name} = {path} lies in the memory of this machine ({file_system(path)}); no node would see it"
            )
    if not cluster.shared:
        return
    shared = [folder.resolve() for folder in cluster.shared]
    for name, path in places.items():
        if path is not None and "://" not in str(path) and not any(path.resolve().is_relative_to(s) for s in shared):
            raise ConfigError(
                f"{name} = {path} is not on a file system that the nodes share ({', '.join(map(str, cluster.shared))});"
                " move it there, or add its folder to shared in the cluster's preset"
            )
