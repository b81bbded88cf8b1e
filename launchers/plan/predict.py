"""The time of a stage's steps on a machine: which hardware, which parts, how they scale, and what that takes for granted."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from launchers.config import ClusterConfig
from launchers.plan.cost import collectives, held_moments, partition, products_of_a_rank, traffic
from launchers.plan.profile import Profile
from launchers.plan.step_time import (
    A100,
    IMAGE,
    MEMORY_SHARE,
    MOVED,
    SCAN_SHARE,
    Hardware,
    Range,
    computing,
    decoding,
    sending,
    together,
    updating,
)
from pipeline.errors import ConfigError
from pipeline.jsonl import read_rows
from pipeline.ops.cuda.counted import GPUS
from pipeline.train.peak import of_data_sheet, peak_flops
from stages.check import derive_batches
from stages.configs.base import StageConfig

# A start imports, forms process groups, builds kernels and reads the checkpoint.
START_SECONDS = 180.0
# On a CPU a step is likely to reach this share of the speed of a matrix product.
CPU_SHARE = 0.1


def hardware(config: StageConfig, cluster: ClusterConfig, earlier: Path | None) -> Hardware:
    """Choose the hardware of the prediction: the preset's GPUs if it has any, else the cores of this machine.

    Args:
        config: The stage's config; its precision decides the peak.
        cluster: The preset.
        earlier: The run's folder. If the run has logged its own utilisation, that is used. None: it is not looked for.
    """
    if cluster.gpus_per_node:
        name = GPUS[cluster.gpu].name
        peak = of_data_sheet(name, config.engine.precision)
        assert peak is not None
        machine = replace(A100, name=name, gpu=cluster.gpu, peak_flops=peak)
    else:
        own = peak_flops(torch.device("cpu"), config.engine.precision) / cluster.ranks_per_node
        machine = Hardware("core of this machine", None, own, CPU_SHARE, cluster.ranks_per_node, 2e9, 1e9, 200e-6)
    rows = read_rows(earlier / "metrics.jsonl") if earlier else []
    seen = [row["perf/mfu"] for row in rows if row.get("perf/mfu")]
    if seen:
        return replace(machine, utilisation=sorted(seen)[len(seen) // 2])
    return machine


def sent_bytes(body: Profile, config: StageConfig, world: int, accumulation: int) -> int:
    """Count the bytes that a rank sends in a step; the arguments are those of `step_range`."""
    averaged = [network for network in body.workload.networks if network.weights == "averaged"]
    return traffic(
        body.parameters,
        zero_stage=config.engine.zero_stage,
        world_size=world,
        accumulation=accumulation,
        averages=len(averaged),
        inferred=sum(network.inferred_images > 0 for network in averaged),
    )


def step_range(
    body: Profile, config: StageConfig, world: int, accumulation: int, images: int, workers: int, machine: Hardware
) -> tuple[dict[str, Range], Range]:
    """Predict an optimizer step of one rank.

    Args:
        body: The stage, measured.
        config: Its config.
        world: The number of ranks.
        accumulation: Micro-batches per step.
        images: Images that all ranks decode in a step.
        workers: Data workers of each rank.
        machine: The assumptions.

    Returns:
        The parts by name, and the whole.
    """
    zero, averages = config.engine.zero_stage, len(body.workload.averages)
    calls = collectives(
        body.parameters,
        zero_stage=zero,
        bucket_bytes=config.engine.bucket_bytes,
        accumulation=accumulation,
        averages=averages,
    )
    samples = config.loop.global_batch / world
    parts = computing(body.work, samples, machine) | {
        "update": updating(
            partition(body.parameters, zero, world),
            held_moments(body.parameters, zero, world),
            averages,
            products_of_a_rank(body.parameters, world),
            machine,
        ),
        "sending": sending(
            sent_bytes(body, config, world, accumulation),
            calls + 2 * body.work.batch_norms * accumulation,
            world,
            machine,
        ),
        "decoding": decoding(images / world, workers),
    }
    return parts, together(parts, body.work, samples, workers, machine)


def scale(
    world: int, body: Profile, config: StageConfig, readers: int, images: int, workers: int, machine: Hardware
) -> dict[str, Any]:
    """Predict the same global batch on `world` devices; the other arguments are those of `step_range`."""
    try:
        _, accumulation = derive_batches(config.loop.global_batch, world, config.engine.micro_batch)
        _, alone_accumulation = derive_batches(config.loop.global_batch, 1, config.engine.micro_batch)
    except ConfigError:
        return {"world_size": world, "possible": False}
    seconds = step_range(body, config, world, accumulation, images, workers, machine)[1].likely
    alone = step_range(body, config, 1, alone_accumulation, images, workers, machine)[1].likely
    return {
        "world_size": world,
        "possible": readers % world == 0,
        "step_seconds": seconds,
        "images_per_second": config.loop.global_batch * body.workload.images / seconds,
        "efficiency": alone / (world * seconds),
    }


def assumptions(machine: Hardware) -> list[str]:
    """List what a prediction on this hardware takes for granted."""
    share = f"likely {100 * machine.product_share:.3g} % of it"
    if machine.utilisation:
        share = f"of which the run has reached {100 * machine.utilisation:.3g} %, which is taken as likely"
    lines = [f"one device is a {machine.name}; products: at most {machine.peak_flops / 1e12:.3g} TFLOP/s, {share}"]
    if machine.gpu:
        lines += [
            f"scans: at least the clocks that `python -m benchmarks.gpu_static` counts for {GPUS[machine.gpu].arch}, likely"
            f" {100 * SCAN_SHARE:.3g} % of that speed",
            f"memory: the kept activations pass it at least {MOVED.least:.3g} times and likely {MOVED.likely:.3g} times, at"
            f" {GPUS[machine.gpu].bandwidth / 1e12:.3g} TB/s, likely {100 * MEMORY_SHARE:.3g} % of it",
        ]
    return [
        *lines,
        f"decoding: {1e3 * IMAGE.least:.3g} to {1e3 * IMAGE.likely:.3g} ms of one core per image of 500 x 375;"
        " workers decode while the device computes",
        f"{machine.node_bandwidth / 1e9:.3g} GB/s from device to device of a node, {machine.network_bandwidth / 1e9:.3g} GB/s"
        f" from node to node, {1e6 * machine.latency:.3g} us a collective and doubling of the ranks",
        "numbers travel as fp32; in a bf16 run a teacher's matrices travel as bf16",
        "reductions do not overlap with the backward pass",
        "slow ranks, evaluations, saves and the host's own time are not counted; of the likely shares that of the scans has been"
        " measured, on an H200",
        "activations are those of a forward pass on the CPU; a GPU's kernels may keep less, its allocator some 10 % more",
        f"a start loses {START_SECONDS:.0f} s before its first step, and the time between the signal and the limit",
    ]
