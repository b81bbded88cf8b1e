"""Schedules: pure functions of the optimizer step, so that a resume needs no state."""

import math
from collections.abc import Callable

from pipeline.train.config import OptimConfig

Schedule = Callable[[int], float]  # optimizer step -> value


def learning_rate(optim: OptimConfig, steps: int) -> Schedule:
    """Return the learning rate of a run of `steps` optimizer steps.

    It rises linearly to `optim.lr`, reached at step `warmup_steps`, and falls until `cooldown_steps` are left.
    """
    total = steps - optim.cooldown_steps
    if optim.schedule == "cosine_7_16":
        return warmup_cosine(
            optim.lr, 0.0, optim.warmup_steps, total, curve=lambda share: math.cos(math.pi * 7 / 16 * share)
        )
    return warmup_cosine(optim.lr, optim.min_lr, optim.warmup_steps, total)


def half_cosine(share: float) -> float:
    """Fall from 1 to 0 while `share` goes from 0 to 1."""
    return (1 + math.cos(math.pi * share)) / 2


def warmup_cosine(
    peak: float, final: float, warmup: int, total: int, curve: Callable[[float], float] = half_cosine
) -> Schedule:
    """Return a linear rise to `peak`, reached at step `warmup`, then a fall along `curve` towards `final` until step `total`.

    Step 0 has peak / (warmup + 1): a first step of zero would only waste a batch.
    """

    def lr_at(step: int) -> float:
        if step < warmup:
            return peak * (step + 1) / (warmup + 1)
        progress = min(1.0, (step - warmup) / max(1, total - warmup))
        return final + (peak - final) * curve(progress)

    return lr_at
