"""What the scans cost at least on a GPU, by the instructions that were counted (torch-free).

`counted.json` holds the counts. `python -m benchmarks.gpu_static --write` compiles the kernels, counts and writes it; the plan
reads it here. It names the hash of the kernels' sources that were counted, so that a test finds a table that is older.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Way = Literal["forward", "backward"]

FOLDER = Path(__file__).parent
TABLE = FOLDER / "counted.json"
SOURCES = ("scan_forward.cu", "scan_backward.cu", "common.cuh", "scan.cuh")
TILE_STEPS, LEAST_STATES = 16, 16  # whole tiles are computed, and 16 states where there are fewer


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """What bounds a kernel on a GPU.

    Attributes:
        name: What it is called.
        arch: Whose counts are its own, `sm_80` or `sm_90`.
        multiprocessors: SMs.
        clock: Boost clock in Hz.
        bandwidth: Bytes per second of the memory.
        cache: Bytes of the L2 cache.
        shared: Bytes of shared memory of an SM.
        float_lanes: fp32 operations of an SM in a clock.
        convert_lanes: Conversions between formats of an SM in a clock.
    """

    name: str
    arch: str
    multiprocessors: int
    clock: float
    bandwidth: float
    cache: int
    shared: int
    float_lanes: int
    convert_lanes: int


# The keys are those of `ClusterConfig.gpu`. The A100 is the one with 40 GB; the one with 80 GB has a faster memory.
GPUS = {
    "a100": Gpu(
        name="A100", arch="sm_80", multiprocessors=108, clock=1.41e9, bandwidth=1.555e12, cache=40 << 20, shared=164 << 10,
        float_lanes=64, convert_lanes=16,
    ),
    "h100": Gpu(
        name="H100", arch="sm_90", multiprocessors=132, clock=1.83e9, bandwidth=3.35e12, cache=50 << 20, shared=228 << 10,
        float_lanes=128, convert_lanes=64,
    ),
    "h200": Gpu(
        name="H200", arch="sm_90", multiprocessors=132, clock=1.83e9, bandwidth=4.8e12, cache=60 << 20, shared=228 << 10,
        float_lanes=128, convert_lanes=64,
    ),
}  # fmt: skip
COUNTED = {"sm_80": "a100", "sm_90": "h100"}  # the architectures whose kernels are counted, and a GPU of each


def sources_hash() -> str:
    """Return a hash of the kernels that the counts are of."""
    digest = hashlib.sha256()
    for name in SOURCES:
        digest.update((FOLDER / name).read_bytes())
    return digest.hexdigest()[:16]


def table() -> dict[str, Any]:
    """Read the counts: architecture -> way -> clocks of one multiprocessor for 1000 state-steps, the busiest unit's.

    A state-step is one channel x one state x one time step. `sources` is the hash of what was counted.
    """
    found: dict[str, Any] = json.loads(TABLE.read_text())
    return found


def scan_clocks(way: Way, gpu: str, *, images: int, directions: int, channels: int, steps: int, states: int) -> float:
    """Return the clocks of one multiprocessor for the scans of a layer; divide by the multiprocessors and the clock rate.

    Args:
        way: The pass.
        gpu: Key of GPUS.
        images: Items of the batch.
        directions: Scans of the layer.
        channels: E.
        steps: L.
        states: N.
    """
    padded = -(-steps // TILE_STEPS) * TILE_STEPS * max(states, LEAST_STATES)
    clocks: float = table()[GPUS[gpu].arch][way]
    return images * directions * channels * padded * clocks / 1000


def scan_seconds(way: Way, gpu: str, *, images: int, directions: int, channels: int, steps: int, states: int) -> float:
    """Return the least seconds of the scans of a layer on one GPU; the arguments are those of `scan_clocks`."""
    sizes = {"directions": directions, "channels": channels, "steps": steps, "states": states}
    return scan_clocks(way, gpu, images=images, **sizes) / GPUS[gpu].multiprocessors / GPUS[gpu].clock
