"""Schedules: pure functions of the optimizer step, so that a resume needs no state."""

import math
from collections.abc import Callable

Schedule = Callable[[int], float]  # optimizer step -> value


def warmup_cosine(peak: float, final: float, warmup: int, total: int) -> Schedule:
    """Return a linear rise to `peak`, reached at step `warmup`, then half a cosine down to `final` at step `total`.

    Step 0 has peak / (warmup + 1): a first step of zero would only waste a batch.
    """

    def lr_at(step: int) -> float:
        if step < warmup:
            return peak * (step + 1) / (warmup + 1)
        progress = min(1.0, (step - warmup) / max(1, total - warmup))
        return final + (peak - final) * (1 + math.cos(math.pi * progress)) / 2

    return lr_at
