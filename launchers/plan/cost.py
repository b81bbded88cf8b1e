"""What a stage will need, as arithmetic: bytes per rank, bytes on disk, bytes on the wire, seconds. Torch-free.

Everything follows from the sizes of the parameters, group by group as the optimizer has them. P is their number, N the
number of ranks; all state is fp32 (bf16 is autocast).
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

FP32 = 4
# DeepSpeed 0.19: ZeRO 1 and 2 pad each group to a multiple of ALIGNMENT x N; ZeRO 3 keeps parameters whole up to this size.
ALIGNMENT = 2
PERSISTENT = 100_000


@dataclass(frozen=True)
class Parameter:
    name: str
    numel: int
    group: int


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank. With `offloaded`, masters, moments and teacher lie in the host's memory instead of the device's."""

    parameters: int
    gradients: int
    masters: int
    moments: int
    teacher: int
    working_teacher: int
    frozen_teacher: int
    buckets: int
    activations: int
    offloaded: bool = False

    @property
    def sharded(self) -> int:
        return self.masters + self.moments + self.teacher

    @property
    def device(self) -> int:
        resident = self.parameters + self.gradients + self.working_teacher + self.frozen_teacher + self.buckets
        return resident + self.activations + (0 if self.offloaded else self.sharded)

    @property
    def host(self) -> int:
        return self.sharded if self.offloaded else 0


def partition(parameters: Sequence[Parameter], zero_stage: int, world_size: int) -> int:
    """Elements of the fp32 masters (and of each moment) that one rank holds, padding included."""
    if zero_stage == 0:
        return sum(p.numel for p in parameters)
    if zero_stage == 3:
        return sum(-(-p.numel // world_size) for p in parameters)
    step = ALIGNMENT * world_size
    groups = {p.group for p in parameters}
    return sum(-(-sum(p.numel for p in parameters if p.group == g) // step) * step for g in groups) // world_size


def memory(
    parameters: Sequence[Parameter],
    *,
    zero_stage: int,
    world_size: int,
    lyapema: bool,
    frozen_teacher: int,
    bucket_bytes: int,
    activations: int,
    offloaded: bool,
) -> Memory:
    """`frozen_teacher` in parameters, `activations` in bytes of one micro-batch."""
    total = sum(p.numel for p in parameters)
    own = partition(parameters, zero_stage, world_size)
    whole = sum(p.numel for p in parameters if p.numel < PERSISTENT)
    compute = own + whole if zero_stage == 3 else total
    return Memory(
        parameters=FP32 * compute,
        gradients=FP32 * (total if zero_stage < 2 else own),
        masters=FP32 * own if zero_stage else 0,  # without ZeRO the parameters are their own masters
        moments=2 * FP32 * own,
        teacher=FP32 * own if lyapema else 0,
        working_teacher=FP32 * total if lyapema else 0,
        frozen_teacher=FP32 * frozen_teacher,
        buckets=bucket_bytes if zero_stage else 0,
        activations=activations,
        offloaded=offloaded,
    )


def checkpoint_bytes(parameters: Sequence[Parameter], lyapema: bool) -> int:
    """Of all files of one checkpoint: masters, two moments and the teacher, and the names that say where each lies."""
    kinds = ("master", "exp_avg", "exp_avg_sq", *(("teacher",) if lyapema else ()))
    numbers = len(kinds) * FP32 * sum(p.numel for p in parameters)
    entry = {"dtype": "F32", "shape": [10_000], "data_offsets": [1_000_000, 1_000_000]}
    header = sum(len(json.dumps({f"{kind}/{p.name}@0": entry})) for kind in kinds for p in parameters)
    return numbers + header


def traffic(
    parameters: Sequence[Parameter], *, zero_stage: int, world_size: int, accumulation: int, lyapema: bool
) -> int:
    """Bytes that a rank sends in one optimizer step, over rings.

    ZeRO 0 reduces all gradients; 1 reduces and scatters them and gathers the weights; 2 does so for every micro-batch;
    3 gathers the weights for every forward and backward pass. LyapEMA gathers the teacher's inference copy.
    """
    once = FP32 * sum(p.numel for p in parameters) * (world_size - 1) / world_size
    passes = {0: 2, 1: 2, 2: accumulation + 1, 3: 3 * accumulation}[zero_stage]
    return round(once * (passes + (1 if lyapema else 0)))


@dataclass(frozen=True)
class Hardware:
    """What a prediction of time rests on; every field is an assumption that the plan prints."""

    name: str
    peak_flops: float  # FLOP/s of one device in the run's precision
    utilisation: float  # share of it that the model reaches (MFU)
    node_devices: int
    node_bandwidth: float  # bytes/s a device sends to another of its node
    network_bandwidth: float  # bytes/s a node sends to another
    latency: float  # seconds a collective takes beside its bytes, per doubling of the ranks
    collectives: int = 4  # per step


A100 = Hardware("A100", 312e12, 0.25, 8, 240e9, 180e9, 20e-6)
"""Eight a node behind NVSwitch and eight 200 Gb/s adapters, at the bus bandwidth NCCL's tests commonly show."""


def step_seconds(flops: float, sent: float, world_size: int, hardware: Hardware) -> float:
    """Of an optimizer step that computes `flops` in all and in which each rank sends `sent` bytes; nothing overlaps."""
    compute = flops / (world_size * hardware.peak_flops * hardware.utilisation)
    if world_size == 1:
        return compute
    crossing = world_size > hardware.node_devices
    # Rings of all adapters run side by side: what crosses between nodes is shared by a node's devices once.
    bandwidth = min(hardware.node_bandwidth, hardware.network_bandwidth) if crossing else hardware.node_bandwidth
    return compute + sent / bandwidth + hardware.collectives * hardware.latency * math.log2(world_size)


def starts_needed(seconds: float, limit: float, overhead: float) -> int:
    """How many starts of `limit` seconds the work takes, if each loses `overhead` to starting and saving."""
    useful = limit - overhead
    return math.ceil(seconds / useful) if useful > 0 else 0
