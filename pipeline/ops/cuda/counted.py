"""What the scans cost at least, by the counted instructions: for the plan, and for `benchmarks.gpu_static`, which counts them.

`gpu_static` prints how far its count is from the numbers here (`recorded_difference`); a change of a kernel changes both.
"""

from typing import Literal

Way = Literal["forward", "backward"]

# Clocks of one multiprocessor for 1000 state-steps (one channel x one state x one time step): the busiest unit's.
CLOCKS: dict[str, dict[Way, float]] = {
    "sm_80": {"forward": 109.7, "backward": 418.7},
    "sm_90": {"forward": 110.7, "backward": 430.1},
}
TILE_STEPS, LEAST_STATES = 16, 16  # whole tiles are computed, and 16 states where there are fewer


def scan_clocks(way: Way, arch: str, *, images: int, directions: int, channels: int, steps: int, states: int) -> float:
    """Return the clocks of one multiprocessor for the scans of a layer; divide by the multiprocessors and the clock rate.

    Args:
        way: The pass.
        arch: `sm_80` or `sm_90`.
        images: Items of the batch.
        directions: Scans of the layer.
        channels: E.
        steps: L.
        states: N.
    """
    padded = -(-steps // TILE_STEPS) * TILE_STEPS * max(states, LEAST_STATES)
    return images * directions * channels * padded * CLOCKS[arch][way] / 1000
