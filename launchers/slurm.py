"""Submit a stage, the chain or a sweep to SLURM. This is the only file that knows submitit.

One task of srun is one rank. A stage waits for the one before it with `afterok` (a point of a sweep for its own, with
`aftercorr`), and SLURM removes it from the queue if that one fails. All checks come before the first submission.
Submitting again submits what is neither complete nor in the queue.
"""

import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from launchers import data_check, queue
from launchers.chain import Step, open_steps
from launchers.config import ClusterConfig, seconds_of
from launchers.job import Job
from launchers.preflight import refuse, refuse_other_values
from pipeline.books import Submission, read_book
from pipeline.errors import EnvironmentProblem, PipelineError
from pipeline.files import replace_text
from pipeline.train.gpus import QUIET_BUT_FOR_CUDA
from pipeline.train.run import has_begun

FOLDER = "slurm"  # in an experiment's folder: the logs of all ranks, what was submitted, and how each start ended


class Submitted(NamedTuple):
    """A job in the queue."""

    stage: str
    experiment: Path
    job_id: str
    state: str  # `submitted` or `queued already`


def run(points: Sequence[Sequence[Step]], cluster: ClusterConfig, folder: Path) -> list[Submitted]:
    """Submit the stages that are neither complete nor in the queue.

    Args:
        points: The steps of every point of a sweep, or of one point.
        cluster: The preset.
        folder: Where the logs go: the experiment's folder, or for a sweep one beside those of its points.

    Returns:
        All jobs that are now in the queue.

    Raises:
        PipelineError: Something is refused. Nothing is submitted then.
    """
    refuse(points, cluster)
    if len(points) == 1 and len(points[0]) > 1 and not any(has_begun(step.folder) for step in points[0]):
        data_check.run(points[0])
    todo = [open_steps(point, cluster.world_size) for point in points]
    there = [[(step, job) for step in point if (job := active_job(step, cluster))] for point in todo]
    jobs: list[Submitted] = []
    free = []  # points without a job in the queue: their stages are submitted together
    for point, queued in zip(todo, there, strict=True):
        jobs += [Submitted(step.stage, step.folder.parent, job, "queued already") for step, job in queued]
        rest = point[point.index(queued[-1][0]) + 1 :] if queued else point
        if rest and queued:  # the rest waits for the last stage that is still in the queue
            jobs += _submit([rest], cluster, (folder / FOLDER).absolute(), queued[-1][1])
        elif rest:
            free.append(rest)
    # Arrays whose tasks wait for one another must have the same points, so points are grouped by their open stages.
    for stages in dict.fromkeys(tuple(step.stage for step in point) for point in free):
        together = [point for point in free if tuple(step.stage for step in point) == stages]
        jobs += _submit(together, cluster, (folder / FOLDER).absolute())
    return jobs


def _submit(points: Sequence[Sequence[Step]], cluster: ClusterConfig, logs: Path, before: str = "") -> list[Submitted]:
    """Submit one job, or one array, per stage, each waiting for the one before; all or none.

    The first waits for the job `before`, if one is given.
    """
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    logs.mkdir(parents=True, exist_ok=True)
    done: list[Submitted] = []
    after = [before] * len(points)
    try:
        for steps in zip(*points, strict=True):
            executor = submitit.AutoExecutor(folder=logs, cluster="slurm")
            first = after[0] if len(steps) == 1 else after[0].partition("_")[0]  # aftercorr takes the whole array
            asked = parameters(cluster, steps[0], logs, first, len(steps))
            executor.update_parameters(**{f"slurm_{name}": value for name, value in asked.items()})
            with executor.batch():
                handles = [executor.submit(_frozen(step, logs)) for step in steps]
            for step, handle, waits in zip(steps, handles, after, strict=True):
                _record(step, cluster, handle.job_id, logs, waits)
                done.append(Submitted(step.stage, step.folder.parent, handle.job_id, "submitted"))
            after = [handle.job_id for handle in handles]
    except (FailedJobError, FailedSubmissionError, PipelineError) as error:
        for job in {submitted.job_id.split("_")[0] for submitted in done}:
            queue.ask("scancel", job)
        words = [line.partition("error: ")[2] for line in str(error).splitlines() if "sbatch: error: " in line]
        raise EnvironmentProblem(
            f"SLURM refuses the job ({words[-1] if words else error}); nothing is submitted; change what the preset asks for"
            " with cluster:key=value"
        ) from None
    return done


def parameters(cluster: ClusterConfig, step: Step, logs: Path, before: str, points: int) -> dict[str, Any]:
    """Translate a preset into submitit's parameters of sbatch.

    Args:
        cluster: The preset.
        step: The stage.
        logs: The folder of all logs.
        before: The id of the job that this one waits for, or empty.
        points: The number of points that are submitted together.
    """
    config = step.config.run
    optional = {"partition", "account", "qos", "constraint"}
    asked = {name: value for name in sorted(optional) if (value := getattr(cluster, name)) is not None}
    if cluster.gpus_per_node:
        asked["gpus_per_node"] = cluster.gpus_per_node
    if cluster.exclusive:
        asked["exclusive"] = True
    if before:
        asked["dependency"] = f"{'aftercorr' if points > 1 else 'afterok'}:{before}"
    verdict = [sys.executable, "-m", "launchers.job", str(logs)]
    own = f"{shlex.quote(str(logs))}/${{SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}${{SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}}"
    return asked | {
        "job_name": f"{config.experiment if points == 1 else logs.parent.name}-{step.stage}",
        "nodes": cluster.nodes,
        "ntasks_per_node": cluster.ranks_per_node,
        "cpus_per_task": cluster.cpus_per_task,
        "mem": f"{cluster.memory_gb}GB",
        "time": seconds_of(cluster.time) // 60,
        "signal_delay_s": cluster.signal_seconds,
        "array_parallelism": cluster.array_parallel,
        # -K1: a rank that fails ends the others at once. srun does not inherit the CPUs of sbatch. Its own binding goes by
        # task numbers; each rank binds itself to the socket of its GPU (`pipeline/train/node.py`).
        "srun_args": ["-K1", f"--cpus-per-task={cluster.cpus_per_task}", "--cpu-bind=none"],
        "setup": [
            *cluster.setup,
            *(gpu_environment(own) if cluster.gpus_per_node else ()),
            f"export OMP_NUM_THREADS=${{OMP_NUM_THREADS:-{cluster.cpus_per_task}}}",
            f'export PYTHONWARNINGS="${{PYTHONWARNINGS:-{QUIET_BUT_FOR_CUDA}}}"',
            f'[ "${{SLURM_RESTART_COUNT:-0}}" -gt 0 ] || rm -rf {own}  # left by an older cluster with the same job id',
            "trap : TERM USR1 USR2  # the verdict comes after srun, however that ends",
        ],
        "teardown": ["code=$?", f"exec {shlex.join(verdict)} $code {cluster.max_requeues}"],
        "additional_parameters": {"requeue": True, "kill-on-invalid-dep": "yes", **cluster.extra},
    }


def gpu_environment(folder: str) -> list[str]:
    """Return shell lines with what torch and NCCL read on GPUs; a variable that the job has already is left alone.

    Args:
        folder: Where a rank writes the last collectives of all ranks if one of them times out. In the terms of the shell.
    """
    values = {
        "TORCH_FR_BUFFER_SIZE": "2000",  # collectives that the flight recorder keeps
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_DUMP_TEMP_FILE": f"{folder}/nccl_rank_",  # torchfrtrace reads them
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",  # less memory is lost between blocks of changing size
        "NCCL_IB_TIMEOUT": "22",  # 4 us x 2^22 = 17 s, so that a switch that reroutes ends no run
        "NCCL_IB_RETRY_CNT": "7",
    }
    return [f"mkdir -p {folder}", *(f'export {name}="${{{name}:-{value}}}"' for name, value in values.items())]


def script(cluster: ClusterConfig, step: Step, logs: Path, before: str) -> str:
    """Return the batch script of a single run, as it would be submitted. The arguments are those of `parameters`."""
    from submitit.slurm.slurm import _make_sbatch_string

    command = f"{shlex.quote(sys.executable)} -u -m submitit.core._submit {shlex.quote(str(logs))}"
    return _make_sbatch_string(command=command, folder=logs, **parameters(cluster, step, logs, before, 1))


def active_job(step: Step, cluster: ClusterConfig) -> str:
    """Return the id of this step's job if it is in the queue, or an empty string.

    Raises:
        ConfigError: The job was submitted with other values, which it will use.
    """
    told = record(step.folder)
    if not told or not queue.job_state(told["job"]).active:
        return ""
    refuse_other_values(step, cluster, told["job"], _frozen_config(step), told.get("cluster", {}))
    return told["job"]


def record(run: Path) -> dict[str, Any]:
    """Read what was last submitted for a run's folder; empty if nothing was."""
    return read_book(run.parent / FOLDER / f"{run.name}.json", Submission)


def _frozen_config(step: Step) -> Path:
    return step.folder.parent.absolute() / FOLDER / f"{step.stage}.yaml"


def _frozen(step: Step, logs: Path) -> Job:
    """Make the job, and write its config beside the logs."""
    path = _frozen_config(step)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, yaml.safe_dump(step.values, sort_keys=False))
    return Job(step.stage, path, step.folder.absolute(), logs)


def _record(step: Step, cluster: ClusterConfig, job_id: str, logs: Path, after: str) -> None:
    told = {"job": job_id, "logs": str(logs), "after": after, "submitted": time.time(), "config": str(step.path)}
    told["cluster"] = cluster.model_dump(mode="json")
    replace_text(step.folder.parent / FOLDER / f"{step.stage}.json", json.dumps(told, indent=1))
