"""The plan of a chain before it starts: steps, hours, memory, disk, traffic, scaling, and the exact commands.

The plan is printed, and written beside the runs; the report of a finished run compares it with what happened:

EXPERIMENT/
  plan.json          every number, and the commands
  plan/STAGE.yaml    the resolved config
  plan/STAGE.sh      the batch script as it would be submitted, except for the id of the job that it waits for
"""

import json
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from launchers import slurm
from launchers.chain import Step, read_cluster
from launchers.config import ClusterConfig, seconds_of
from launchers.plan import limits
from launchers.plan.cost import checkpoint_bytes, memory, starts_needed
from launchers.plan.predict import START_SECONDS, assumptions, hardware, scale, sent_bytes, step_range
from launchers.plan.profile import profile
from launchers.plan.step_time import A100
from launchers.plan.text import show
from pipeline.errors import ConfigError, PipelineError
from pipeline.files import replace_text
from pipeline.identity import dump_yaml
from pipeline.train.run import has_begun, identity_sha256
from stages import spec_of
from stages.check import Pending, check, derive_batches, open_data, written_by
from stages.configs.base import StageConfig
from stages.spec import Stream

THIS_MACHINE = Path("configs/cluster/cpu.yaml")
WORLDS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
ZERO_STAGES = (0, 1, 2, 3)


def run(steps: Sequence[Step], cluster: ClusterConfig) -> int:
    """Print the plan and write it.

    If the experiment has begun and the plan has problems, it is printed only: the plan of the experiment's start is kept.

    Returns:
        0, or the exit code of the first problem.
    """
    plan, problems = make(steps, cluster)
    kept = bool(problems) and any(has_begun(step.folder) for step in steps)
    if not kept:
        write(plan, steps, cluster)
    show(plan, None if kept else steps[0].folder.parent)
    return problems[0].exit_code if problems else 0


def plan_ahead(steps: Sequence[Step], nproc: int) -> None:
    """Write the plan of a chain on this machine, unless the chain has begun."""
    if not any(has_begun(step.folder) for step in steps):
        cluster, _ = read_cluster(THIS_MACHINE, ["cluster:nodes=1", f"cluster:tasks_per_node={nproc}"])
        write(make(steps, cluster)[0], steps, cluster)


def make(steps: Sequence[Step], cluster: ClusterConfig) -> tuple[dict[str, Any], list[PipelineError]]:
    """Make the plan.

    Returns:
        The plan as it goes into plan.json, and its problems.
    """
    pending: dict[Path, StageConfig] = {}
    stages: list[dict[str, Any]] = []
    problems: list[PipelineError] = []
    for step in steps:
        found = len(problems)
        try:
            check(step.config, cluster.world_size, pending)
        except PipelineError as error:
            problems.append(error)
        if not (step.folder / "export").is_dir():
            pending |= written_by(step.config)
        try:
            stages.append(_stage(step, cluster, pending))
        except PipelineError as error:  # its model depends on a parent that is missing; the check has said so already
            problems += [error] if len(problems) == found else []
        else:
            problems += limits.check_stage(stages[-1], cluster)
    folder = steps[0].folder.parent
    needed, free = sum(s["disk_bytes"] for s in stages), _free_bytes(folder)
    problems += limits.check_disk(needed, free)
    plan = {
        "experiment": folder.name,
        "cluster": cluster.model_dump(mode="json"),
        "assumptions": assumptions(hardware(steps[0].config, cluster, None)),
        "stages": stages,
        "disk": {"needed": needed, "free": free},
        "problems": [str(p) for p in problems],
    }
    return plan, problems


def write(plan: Mapping[str, Any], steps: Sequence[Step], cluster: ClusterConfig) -> None:
    """Write the files of a plan into the experiment's folder."""
    folder = steps[0].folder.parent
    (folder / "plan").mkdir(parents=True, exist_ok=True)
    replace_text(folder / "plan.json", json.dumps(plan, indent=1))
    for i, step in enumerate(steps):
        replace_text(folder / "plan" / f"{step.stage}.yaml", dump_yaml(step.config))
        awaited = f"{{{steps[i - 1].stage}'s job}}" if i else ""
        script = slurm.script(cluster, step, (folder / slurm.FOLDER).absolute(), awaited)
        replace_text(folder / "plan" / f"{step.stage}.sh", script)


def _stage(step: Step, cluster: ClusterConfig, pending: Pending) -> dict[str, Any]:
    config, world = step.config, cluster.world_size
    streams, num_classes, shards = _data(config)
    body = profile(config, num_classes, pending)
    try:
        micro_batch, accumulation = derive_batches(config.loop.global_batch, world, config.engine.micro_batch)
    except ConfigError:  # it is among the problems; the plan continues with the nearest numbers
        micro_batch, accumulation = max(1, config.loop.global_batch // world), 1
    machine = hardware(config, cluster, step.folder)
    averages, loop, readers = body.workload.averages, config.loop, _virtual_readers(config, streams)
    by_stage = {}
    for zero in ZERO_STAGES:
        needs = memory(
            body.parameters,
            zero_stage=zero,
            world_size=world,
            averages=len(averages),
            frozen_parameters=body.frozen_parameters,
            bucket_bytes=config.engine.bucket_bytes,
            activations=body.fixed_activations + micro_batch * body.workload.images * body.image_activations,
            offloaded=config.engine.offload_optimizer and zero > 0,
            keeps_best=loop.select == "best",
        )
        by_stage[str(zero)] = asdict(needs) | {"device": needs.device, "host": needs.host}
    sent = sent_bytes(body, config, world, accumulation)
    workers = min(config.data.loader.workers, cluster.cpus_per_task)
    images = sum(stream.global_batch for stream in streams.values()) or body.workload.images * loop.global_batch
    parts, whole = step_range(body, config, world, accumulation, images, workers, machine)
    seconds = whole.likely
    written = -(-loop.steps // loop.save_every) + (loop.on_divergence == "rewind")
    kept = min(written, loop.keep_checkpoints) + (loop.steps // loop.keep_every if loop.keep_every else 0)
    kinds = list(averages)
    kinds += [f"best_{kind}" for kind in ("master", *averages)] if loop.select == "best" else []
    size = checkpoint_bytes(body.parameters, kinds)
    starts = starts_needed(loop.steps * seconds, seconds_of(cluster.time), START_SECONDS + cluster.signal_seconds)
    return {
        "stage": step.stage,
        "config_sha256": identity_sha256(config),
        "world_size": world,
        "steps": loop.steps,
        "micro_batch": micro_batch,
        "accumulation": accumulation,
        "samples": loop.steps * loop.global_batch,
        "epochs": _epochs(config, streams),
        "images_per_step": body.workload.images * loop.global_batch,
        "virtual_readers": readers,
        "shards": shards,
        "worlds_possible": [n for n in range(1, 513) if readers % n == 0],
        "parameters": sum(p.numel for p in body.parameters),
        "averages": list(averages),
        "frozen_parameters": body.frozen_parameters,
        "zero_stage": config.engine.zero_stage,
        "memory": by_stage,
        "memory_gib": by_stage[str(config.engine.zero_stage)]["device"] / 2**30,
        "checkpoint_bytes": size,
        "checkpoints_written": written,
        # While a checkpoint is written, one more than are kept lies on the disk. An export holds the weights once.
        "disk_bytes": (kept + 1) * size + 4 * sum(p.numel for p in body.parameters),
        "flops_per_step": body.work.flops * loop.global_batch,
        "sent_bytes_per_step": sent,
        "step_seconds": seconds,
        "step_seconds_least": whole.least,
        "step_parts": {name: part._asdict() for name, part in parts.items()},
        "workers": workers,
        "hours": loop.steps * seconds / 3600,
        "hours_least": loop.steps * whole.least / 3600,
        "device_hours": world * loop.steps * seconds / 3600,
        "starts": starts,
        "scaling": [
            scale(n, body, config, readers, images, workers, replace(machine, node_devices=A100.node_devices))
            for n in WORLDS
        ],
        "commands": _commands(step, cluster),
    }


def _data(config: StageConfig) -> tuple[dict[str, Stream], int, int]:
    """Return the streams, and the numbers of classes and shards; without data none, 1000 and 0."""
    try:
        data = open_data(config)
    except PipelineError:  # it is among the problems
        return {}, 1000, 0
    return spec_of(config).streams(config, data.subsets), len(data.manifest.classes), len(data.manifest.shards)


def _epochs(config: StageConfig, streams: Mapping[str, Stream]) -> dict[str, float]:
    """Passes over each stream (as many draws as it has samples, if the sampling is not uniform)."""
    return {
        name: config.loop.steps * stream.global_batch / max(1, len(stream.sample_indices))
        for name, stream in streams.items()
    }


def _virtual_readers(config: StageConfig, streams: Mapping[str, Stream]) -> int:
    """Virtual readers as the stage will have them; without data, as many as the batch allows."""
    samples = [len(stream.sample_indices) for stream in streams.values()] or [config.loop.global_batch]
    return config.virtual_readers(samples)


def _commands(step: Step, cluster: ClusterConfig) -> dict[str, str]:
    what = shlex.join([step.stage, str(step.path), *step.overrides])
    ranks = cluster.ranks_per_node
    meeting = f"--rdzv-backend c10d --rdzv-endpoint HOST:29500 --rdzv-id {step.config.run.experiment}-{step.stage}"
    return {
        "one machine": f"python -m launchers local {what} --nproc {cluster.world_size}",
        "torchrun, on every node": f"torchrun --nnodes {cluster.nodes} --nproc-per-node {ranks} {meeting} -m stages {what}",
        "deepspeed, on the first node": f"deepspeed --hostfile HOSTS --no_local_rank --module stages {what}",
    }


def _free_bytes(folder: Path) -> int:
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    return shutil.disk_usage(there).free
