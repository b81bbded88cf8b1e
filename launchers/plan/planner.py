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

import torch

from launchers import slurm
from launchers.chain import Step, read_cluster
from launchers.config import ClusterConfig, seconds_of
from launchers.plan import limits
from launchers.plan.cost import A100, Hardware, checkpoint_bytes, memory, starts_needed, step_seconds, traffic
from launchers.plan.profile import Profile, profile
from launchers.plan.text import show
from pipeline.config import dump_yaml
from pipeline.errors import ConfigError, PipelineError
from pipeline.files import replace_text
from pipeline.jsonl import read_rows
from pipeline.train.peak import peak_flops
from pipeline.train.run import has_begun, identity_sha256
from stages import spec_of
from stages.check import Pending, check, derive_batches, open_data, written_by
from stages.configs.base import StageConfig
from stages.spec import Stream

THIS_MACHINE = Path("configs/cluster/cpu.yaml")
START_SECONDS = 180.0  # what a start takes: imports, process groups, kernels, reading the checkpoint
WORLDS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
CPU_UTILISATION = 0.1
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
        "assumptions": _assumptions(hardware(steps[0].config, cluster, None)),
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
            moments=len(config.optim.moments),
            averages=len(averages),
            frozen_parameters=body.frozen_parameters,
            bucket_bytes=config.engine.bucket_bytes,
            activations=body.fixed_activations + micro_batch * body.workload.images * body.image_activations,
            offloaded=config.engine.offload_optimizer and zero > 0,
            keeps_best=loop.select == "best",
        )
        by_stage[str(zero)] = asdict(needs) | {"device": needs.device, "host": needs.host}
    sent = _traffic(body, config, world, accumulation)
    seconds = step_seconds(body.flops * loop.global_batch, sent, world, machine)
    written = -(-loop.steps // loop.save_every) + (loop.on_divergence == "rewind")
    kept = min(written, loop.keep_checkpoints) + (loop.steps // loop.keep_every if loop.keep_every else 0)
    kinds = [*config.optim.moments, *averages]
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
        "flops_per_step": body.flops * loop.global_batch,
        "sent_bytes_per_step": sent,
        "step_seconds": seconds,
        "hours": loop.steps * seconds / 3600,
        "device_hours": world * loop.steps * seconds / 3600,
        "starts": starts,
        "scaling": [_scale(n, body, config, readers, replace(machine, node_devices=A100.node_devices)) for n in WORLDS],
        "commands": _commands(step, cluster),
    }


def hardware(config: StageConfig, cluster: ClusterConfig, earlier: Path | None) -> Hardware:
    """Choose the hardware of the prediction: A100s if the cluster has GPUs, else the cores of this machine.

    Args:
        config: The stage's config; its precision decides the peak.
        cluster: The preset.
        earlier: The run's folder. If the run has logged its own utilisation, that is used. None: it is not looked for.
    """
    if cluster.gpus_per_node:
        machine = replace(A100, peak_flops=A100.peak_flops if config.engine.precision == "bf16" else 19.5e12)
    else:
        own = peak_flops(torch.device("cpu"), config.engine.precision) / cluster.ranks_per_node
        machine = Hardware("core of this machine", own, CPU_UTILISATION, cluster.ranks_per_node, 2e9, 1e9, 200e-6)
    rows = read_rows(earlier / "metrics.jsonl") if earlier else []
    seen = [row["perf/mfu"] for row in rows if row.get("perf/mfu")]
    if seen:
        return replace(machine, utilisation=sorted(seen)[len(seen) // 2])
    return machine


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


def _traffic(body: Profile, config: StageConfig, world: int, accumulation: int) -> int:
    return traffic(
        body.parameters,
        zero_stage=config.engine.zero_stage,
        world_size=world,
        accumulation=accumulation,
        averages=len(body.workload.averages),
    )


def _scale(world: int, body: Profile, config: StageConfig, readers: int, machine: Hardware) -> dict[str, Any]:
    """Predict the same global batch on `world` devices."""
    flops = body.flops * config.loop.global_batch
    alone = step_seconds(flops, 0, 1, machine)
    try:
        _, accumulation = derive_batches(config.loop.global_batch, world, config.engine.micro_batch)
    except ConfigError:
        return {"world_size": world, "possible": False}
    seconds = step_seconds(flops, _traffic(body, config, world, accumulation), world, machine)
    return {
        "world_size": world,
        "possible": readers % world == 0,
        "step_seconds": seconds,
        "images_per_second": config.loop.global_batch * body.workload.images / seconds,
        "efficiency": alone / (world * seconds),
    }


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


def _assumptions(machine: Hardware) -> list[str]:
    return [
        f"one device is a {machine.name} of {machine.peak_flops / 1e12:.3g} TFLOP/s, of which a step reaches"
        f" {100 * machine.utilisation:.3g} % (once the run has started: what it measured)",
        f"{machine.node_bandwidth / 1e9:.3g} GB/s from device to device of a node, {machine.network_bandwidth / 1e9:.3g} GB/s"
        f" from node to node, {1e6 * machine.latency:.3g} us a collective and doubling of the ranks",
        "reductions do not overlap with the backward pass",
        "no step waits for data; slow ranks, evaluations and saves are not counted",
        "activations are those of a forward pass on the CPU; a GPU's kernels may keep less, its allocator some 10 % more",
        f"a start loses {START_SECONDS:.0f} s before its first step, and the time between the signal and the limit",
    ]
