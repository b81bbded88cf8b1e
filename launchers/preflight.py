"""What a cluster would accept and never run, or run in the wrong place: refused before anything is submitted."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launchers import queue
from launchers.chain import Step
from launchers.config import ClusterConfig, seconds_of
from launchers.filesystem import file_system
from pipeline.config import flatten, load_config
from pipeline.errors import ConfigError, EnvironmentProblem
from stages import spec_of

# Of a shell that torchrun or another launcher made: they would be believed in the job.
_WORLD = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_IN_MEMORY = ("tmpfs", "ramfs", "devtmpfs")


def refuse(points: Sequence[Sequence[Step]], cluster: ClusterConfig) -> None:
    """Raises for what SLURM would accept and never run, and for what would run in the wrong place."""
    if not queue.available():
        raise _no_slurm("there is no sbatch here", points[0])
    set_already = [name for name in _WORLD if name in os.environ]
    if set_already:
        raise EnvironmentProblem(
            f"{', '.join(set_already)} would travel from this shell into the job, where srun says who is who;"
            f" unset {' '.join(set_already)}"
        )
    try:
        check_partition(cluster)
    except EnvironmentProblem as error:
        raise _no_slurm(str(error), points[0]) from None
    for point in points:
        for step in point:
            check_shared(step, cluster)


def _no_slurm(why: str, steps: Sequence[Step]) -> EnvironmentProblem:
    names = [step.path.stem for step in steps]
    chain = f"chain NAME={','.join(names if len(set(names)) > 1 else names[:1])}"
    what = chain if len(steps) > 1 else f"stage-{spec_of(steps[0].config).number} CONFIG={steps[0].path}"
    return EnvironmentProblem(
        f"no SLURM answers on this machine ({why}); submit from a login node of a cluster, or run"
        f" {'the chain' if len(steps) > 1 else 'the stage'} here with: make {what}"
    )


def refuse_other_values(
    step: Step, cluster: ClusterConfig, job_id: str, submitted: Path, submitted_cluster: Mapping[str, Any]
) -> None:
    """Raises ConfigError unless a job in the queue was submitted with what is asked for now, to the last key."""
    asked = {**step.config.model_dump(mode="json"), "cluster": cluster.model_dump(mode="json")}
    before = load_config(type(step.config), submitted).model_dump(mode="json")
    there, here = flatten({**before, "cluster": submitted_cluster}), flatten(asked)
    different = [key for key in sorted(there.keys() | here.keys()) if there.get(key) != here.get(key)]
    if different:
        key = different[0]
        raise ConfigError(
            f"job {job_id}, {step.stage} of {step.config.run.experiment}, is in the queue with other values"
            f" ({len(different)} keys differ; {key} was {there.get(key)!r}, is now {here.get(key)!r}); give it the values it"
            f" was submitted with, or `scancel {job_id}` and submit again"
        )


def check_partition(cluster: ClusterConfig) -> None:
    """Against what the cluster says of itself. Raises ConfigError.

    Of a list (`a,b`) SLURM takes whichever comes first: one that fits is enough.
    """
    rows = [queue.fields(line) for line in queue.ask("scontrol", "-o", "show", "partition").splitlines()]
    known = {row["PartitionName"]: row for row in rows}
    default = next((name for name, row in known.items() if row.get("Default") == "YES"), None)
    asked = cluster.partition or default
    if asked is None:
        raise ConfigError(
            f"the cluster has no default partition; give cluster:partition=NAME, one of {', '.join(known)}"
        )
    names = asked.split(",")
    for name in names:
        if name not in known:
            raise ConfigError(f"partition {name!r} is unknown to this cluster; it has {', '.join(known)}")
    reasons = [_misfit(name, known[name], cluster) for name in names]
    if all(reasons):
        raise ConfigError("; ".join(reasons))


def _misfit(name: str, partition: Mapping[str, str], cluster: ClusterConfig) -> str:
    """Why a job would wait in that partition for ever, or nothing."""
    limit, nodes = partition.get("MaxTime", "UNLIMITED"), partition.get("TotalNodes", "")
    if limit not in ("UNLIMITED", "INFINITE") and seconds_of(cluster.time) > seconds_of(limit):
        remedy = f"give cluster:time={limit} or less, requeues do the rest"
        return (
            f"cluster time {cluster.time} is above the limit of partition {name}, {limit}: the job would wait for ever;"
            f" {remedy if seconds_of(limit) else 'choose another partition'}"
        )
    if nodes.isdigit() and cluster.nodes > int(nodes):
        return f"{cluster.nodes} nodes are asked of partition {name}, which has {nodes}; lower cluster:nodes"
    return ""


def check_shared(step: Step, cluster: ClusterConfig) -> None:
    """Raises ConfigError for a run folder, data or a parent that the nodes would not see, as far as it can be known."""
    places = spec_of(step.config).paths(step.config)
    for name, path in places.items():
        if file_system(path) in _IN_MEMORY:
            raise ConfigError(
                f"{name} = {path} lies in the memory of this machine ({file_system(path)}); no node would see it"
            )
    if not cluster.shared:
        return
    shared = [folder.resolve() for folder in cluster.shared]
    for name, path in places.items():
        if "://" not in str(path) and not any(path.resolve().is_relative_to(s) for s in shared):
            raise ConfigError(
                f"{name} = {path} is not on a file system that the nodes share ({', '.join(map(str, cluster.shared))});"
                " move it there, or add its folder to shared in the cluster's preset"
            )
