"""The time of an optimizer step, as the least that the hardware allows and as what is likely.

The least takes every unit at its peak: products and convolutions at the data sheet's FLOP/s, scans at the clocks that
`benchmarks.gpu_static` has counted, memory at its bandwidth. Products and scans follow one another, so they add; what they move
through memory can hide behind them. The likely time divides by shares of the peaks and hides nothing; of these, that of the
scans was measured on an H200 (docs/kernels.md). Sending adds to both, since reductions do not overlap with the backward pass.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from launchers.plan.cost import FP32
from pipeline.models.flops import ScanSize
from pipeline.ops.cuda.counted import GPUS, scan_seconds


class Passes(NamedTuple):
    """How often something passes through a step, per sample of the first stream."""

    forward: float
    backward: float


@dataclass(frozen=True)
class Work:
    """What one optimizer step computes per sample of the first stream.

    Attributes:
        flops: FLOPs that the step must compute, scans included: the numerator of MFU.
        products: FLOPs of products and convolutions, with what activation checkpointing computes twice.
        scans: The scans of all networks, by their size.
        kept: Bytes of activations that the backward pass needs.
        batch_norms: Batch norms that see all ranks, per forward and backward pass of a micro-batch.
    """

    flops: float
    products: float
    scans: Mapping[ScanSize, Passes]
    kept: float
    batch_norms: int


class Range(NamedTuple):
    """Seconds: the least, and the likely."""

    least: float
    likely: float

    def __add__(self, other: object) -> "Range":
        """Add two ranges."""
        assert isinstance(other, Range)
        return Range(self.least + other.least, self.likely + other.likely)


@dataclass(frozen=True)
class Hardware:
    """The assumptions behind a prediction of time. The plan prints them.

    Attributes:
        name: What one device is called.
        gpu: Key of `pipeline.ops.cuda.counted.GPUS`, by whose counts the scans are timed; None for a CPU.
        peak_flops: FLOP/s of one device in the run's precision.
        product_share: Share of the peak that products are likely to reach.
        node_devices: Devices of a node.
        node_bandwidth: Bytes/s that a device sends to another device of its node.
        network_bandwidth: Bytes/s that a node sends to another node.
        latency: Seconds that a collective takes beside its bytes, per doubling of the ranks.
        utilisation: MFU that the run itself has logged; it takes the place of the likely time of computing. None = none yet.
    """

    name: str
    gpu: str | None
    peak_flops: float
    product_share: float
    node_devices: int
    node_bandwidth: float
    network_bandwidth: float
    latency: float
    utilisation: float | None = None


A100 = Hardware("A100", "a100", 312e12, 0.5, 8, 240e9, 180e9, 20e-6)
"""Eight a node behind NVSwitch and eight 200 Gb/s adapters, at the bus bandwidth NCCL's tests commonly show."""

# Which share of the counted clocks and of the bandwidth kernels reach, and how often activations pass through memory. An H200
# reached 0.63 of the clocks in the forward and 0.58 in the backward; the others are ours and unmeasured. Activations written
# once and read once are the least; steps between the kept ones write and read theirs too.
SCAN_SHARE, MEMORY_SHARE = 0.6, 0.8
MOVED = Range(2.0, 4.0)
# Bytes that an update moves: it reads a gradient, and reads and writes the weight and each number that it keeps of it.
UPDATE_BYTES, MOMENT_BYTES = 3 * FP32, 2 * FP32
AVERAGE_BYTES = 3 * FP32
# Seconds of one core per image of 500 x 375: decoding and resizing alone, and a whole view with RandAugment (docs/data.md).
IMAGE = Range(1.66e-3, 2 / 219)


def computing(work: Work, samples: float, machine: Hardware) -> dict[str, Range]:
    """Predict what one device computes in a step for `samples` of the first stream, by kind of work."""
    if machine.gpu is None:
        least = work.flops * samples / machine.peak_flops
        return {"computing": Range(least, least / (machine.utilisation or machine.product_share))}
    products = work.products * samples / machine.peak_flops
    scans = sum(
        passes.forward * scan_seconds("forward", machine.gpu, images=1, directions=1, **scan._asdict())
        + passes.backward * scan_seconds("backward", machine.gpu, images=1, directions=1, **scan._asdict())
        for scan, passes in work.scans.items()
    )
    moved = work.kept * samples / GPUS[machine.gpu].bandwidth
    return {
        "products": Range(products, products / machine.product_share),
        "scans": Range(samples * scans, samples * scans / SCAN_SHARE),
        "memory": Range(MOVED.least * moved, MOVED.likely * moved / MEMORY_SHARE),
    }


def updating(own: int, moments: int, averages: int, products: float, machine: Hardware) -> Range:
    """Predict the update of one device.

    Limit: products count at the speed of the run's precision, though a GPU computes Muon's in bf16.

    Args:
        own: Weights that it updates.
        moments: Numbers that the optimizer keeps of them.
        averages: Averages that follow them.
        products: FLOPs of the products that it computes for Muon.
        machine: The assumptions.
    """
    computed = products / machine.peak_flops
    # A logged MFU divides by the whole step, so most of the products' time is in the time of computing already.
    share = 1.0 if machine.utilisation else machine.product_share
    if machine.gpu is None:
        return Range(computed, computed / share)  # the rest is within the utilisation of a CPU
    moved = own * (UPDATE_BYTES + averages * AVERAGE_BYTES) + moments * MOMENT_BYTES
    passed = moved / GPUS[machine.gpu].bandwidth
    return Range(computed + passed, computed / share + passed / MEMORY_SHARE)


def sending(sent: float, calls: float, world_size: int, machine: Hardware) -> Range:
    """Predict the collectives of a step.

    Args:
        sent: Bytes that each rank sends.
        calls: Collectives.
        world_size: The number of ranks.
        machine: The assumptions.
    """
    if world_size == 1:
        return Range(0.0, 0.0)
    crossing = world_size > machine.node_devices
    # The rings of all adapters run in parallel, so the devices of a node share the bandwidth between nodes once.
    bandwidth = min(machine.node_bandwidth, machine.network_bandwidth) if crossing else machine.node_bandwidth
    seconds = sent / bandwidth + calls * machine.latency * math.log2(world_size)
    return Range(seconds, seconds)


def decoding(images: float, workers: int) -> Range:
    """Predict how long the data workers of one rank take for its images of a step; without workers it is the rank itself."""
    return Range(*(images * seconds / max(1, workers) for seconds in IMAGE))


def together(parts: Mapping[str, Range], work: Work, samples: float, workers: int, machine: Hardware) -> Range:
    """Put the parts of a step together.

    Args:
        parts: What `computing` returns; beside it `update`, `sending` and `decoding`.
        work: The work of the step.
        samples: Of the first stream, on one device.
        workers: Data workers of a rank; they decode while the device computes.
        machine: The assumptions.
    """
    sums = {name: part for name, part in parts.items() if name not in ("memory", "update", "sending", "decoding")}
    least, likely = sum(part.least for part in sums.values()), sum(part.likely for part in sums.values())
    if memory := parts.get("memory"):
        least, likely = max(least, memory.least), likely + memory.likely
    if machine.utilisation and machine.gpu:
        likely = max(least, work.flops * samples / (machine.peak_flops * machine.utilisation))
    device = Range(least, likely) + parts["update"] + parts["sending"]
    decode = parts["decoding"]
    if not workers:
        return device + decode
    return Range(max(device.least, decode.least), max(device.likely, decode.likely))
