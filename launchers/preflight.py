"""Checks before a submission: SLURM accepts jobs that it never runs, or that run in the wrong place. They are refused here."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launchers import queue
from launchers.chain import Step
from launchers.config import ClusterConfig, seconds_of
from pipeline.config import load_config
from pipeline.errors import ConfigError, EnvironmentProblem
from pipeline.files import file_system, real_path
from pipeline.identity import flatten
from pipeline.train import rendezvous
from stages import spec_of

_IN_MEMORY = ("tmpfs", "ramfs", "devtmpfs")


def refuse(points: Sequence[Sequence[Step]], cluster: ClusterConfig) -> None:
    """Refuse jobs that SLURM would never run or that would run in the wrong place.

    Args:
        points: The steps of every point of a sweep, or of one point.
        cluster: The preset.

    Raises:
        PipelineError: Says what to change.
    """
    if not queue.available():
        raise _no_slurm("there is no sbatch here", points[0])
    # torchrun and other launchers set them in their shells; a job would inherit and believe them.
    set_already = [name for name in rendezvous.NAMES if name in os.environ]
    if set_already:
        raise EnvironmentProblem(
            f"{', '.join(set_already)} are set in this shell, and a job would inherit them in place of srun's; type:"
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
    """Refuse to submit a stage with other values while its job is in the queue.

    Args:
        step: What is asked for now.
        cluster: The preset of now.
        job_id: The job in the queue.
        submitted: The config file of that job.
        submitted_cluster: The preset of that job.

    Raises:
        ConfigError: A key differs.
    """
    asked = {**step.config.model_dump(mode="json"), "cluster": cluster.model_dump(mode="json")}
    before = load_config(type(step.config), submitted).model_dump(mode="json")
    there, here = flatten({**before, "cluster": submitted_cluster}), flatten(asked)
    different = [key for key in sorted(there.keys() | here.keys()) if there.get(key) != here.get(key)]
    if different:
        key = different[0]
        raise ConfigError(
            f"job {job_id}, stage {step.stage} of {step.config.run.experiment}, is in the queue with other values"
            f" ({len(different)} keys differ; {key} was {there.get(key)!r}, is now {here.get(key)!r}); give the values that it"
            f" was submitted with, or type `scancel {job_id}` and submit again"
        )


def check_partition(cluster: ClusterConfig) -> None:
    """Compare the preset with the partitions that the cluster has.

    SLURM takes any partition of a list (`a,b`), so one that fits is enough.

    Raises:
        ConfigError: No named partition exists or fits.
        EnvironmentProblem: SLURM does not respond.
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
            raise ConfigError(
                f"the cluster has no partition {name!r}; give cluster:partition=NAME, one of {', '.join(known)}"
            )
    reasons = [_misfit(name, known[name], cluster) for name in names]
    if all(reasons):
        raise ConfigError("; ".join(reasons))


def _misfit(name: str, partition: Mapping[str, str], cluster: ClusterConfig) -> str:
    """Say why a job would wait in that partition for ever; empty if it would not."""
    limit, nodes = partition.get("MaxTime", "UNLIMITED"), partition.get("TotalNodes", "")
    if limit not in ("UNLIMITED", "INFINITE") and seconds_of(cluster.time) > seconds_of(limit):
        remedy = f"give cluster:time={limit} or less: a job that runs out of time is requeued and continues"
        return (
            f"cluster:time {cluster.time} is above the limit {limit} of partition {name}, so the job would wait for ever;"
            f" {remedy if seconds_of(limit) else 'choose another partition'}"
        )
    if nodes.isdigit() and cluster.nodes > int(nodes):
        return f"cluster:nodes is {cluster.nodes}, but partition {name} has {nodes}; lower cluster:nodes"
    return ""


def check_shared(step: Step, cluster: ClusterConfig) -> None:
    """Refuse paths of a stage that the nodes would not see, as far as this machine can know.

    Raises:
        ConfigError: A path is in memory, or outside the folders that the preset lists as shared.
    """
    places = spec_of(step.config).paths(step.config)
    for name, path in places.items():
        if file_system(path) in _IN_MEMORY:
            raise ConfigError(
                f"stage {step.stage}: {name} = {path} is in the memory of this machine ({file_system(path)}), which no node sees;"
                " move it to a file system that the nodes share"
            )
    if not cluster.shared:
        return
    shared = [real_path(folder) for folder in cluster.shared]
    for name, path in places.items():
        if "://" not in str(path) and not any(real_path(path).is_relative_to(s) for s in shared):
            raise ConfigError(
                f"stage {step.stage}: {name} = {path} is not on a file system that the nodes share"
                f" ({', '.join(map(str, cluster.shared))}); move it there, or add its folder to `shared` in the cluster's preset"
            )
