"""LyapEMA: a teacher moved by an average whose decay answers to the discrepancy |s - t| (Semi-ViM, supplement eq. 3-5).

With s the student before a step, s' after it, t the teacher, r = s - t and d = s' - t, the teacher becomes
t' = a t + (1 - a) s', so that s' - t' = a d and the energy V = |s - t|^2 / 2 becomes V' = a^2 |d|^2 / 2: exact for
any student step. V' <= V needs a <= |r| / |d|; the supplement's eq. (7), which claims it always, does not follow.

- `ema`      a = base_decay.
- `lyap`     a = sigmoid(b + gamma rho), b = logit(base_decay), rho = |d| in the chosen norm, clamped to
             [min_decay, max_decay]. The supplement is b = 0 (base_decay 0.5), norm l2, no clamp.
- `guarded`  also a <= max(|r|, R) / |d|. Then |r'| <= max(|r|, R): V never grows beyond a ball of radius R, and never
             grows outside of it. R = radius_steps x the mean student step: with R = 0 a teacher that once equals its
             student would equal it for ever.

1 - a is computed as sigmoid(-x), which stays above zero where sigmoid(x) rounds to one. The pull lambda (t - s) is
applied inside the next optimizer step, before AdamW's update, so no compute copy goes stale (AdamW's own weight decay
then acts on the pulled weight: a term of order lr x decay x lambda apart from eq. 3).
The teacher lies beside the optimizer's fp32 masters, so ZeRO shards it: 4P/N bytes a rank, one all-reduced pair of
scalars a step.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.train.config import LyapEMAConfig
from pipeline.train.task import Mean

# The guard is exact in real numbers; rounding the fp32 teacher may exceed it by about an ulp of |t| over |d|.
GUARD_SLACK = 1e-4
# The mean student step is an average over about this many steps.
STEP_HORIZON = 50


class LyapEMA:
    """The fp32 teacher and its certificate. Call `update` after each real optimizer step.

    `masters`: the fp32 tensors that `optimizer` steps, this rank's part of the weights; `all_reduce` sums a tensor over
    the owners of the other parts. The teacher is {master: its average}, laid out alike.
    """

    def __init__(
        self,
        masters: Sequence[Tensor],
        optimizer: torch.optim.Optimizer,
        config: LyapEMAConfig,
        all_reduce: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> None:
        self.config, self.all_reduce = config, all_reduce
        self.teacher = {master: master.detach().clone() for master in masters}
        zero = torch.zeros((), dtype=torch.float64, device=masters[0].device)
        self.num_weights = all_reduce(zero + sum(master.numel() for master in masters))  # padding included
        self.radius, self.mean_step, self.updates = zero.clone(), zero.clone(), 0
        self._moved_squared = zero.clone()
        self._before: dict[Tensor, Tensor] = {}
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)

    # DeepSpeed steps the optimizer group by group; the hooks see the groups of one call.
    def _before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for flat in _stepped(optimizer):
            self._before[flat] = flat.detach().clone()
            if self.config.pull:
                flat.detach().lerp_(self.teacher[flat], self.config.pull)

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for flat in _stepped(optimizer):
            self._moved_squared += squared_distance(flat, self._before.pop(flat))

    def update(self) -> dict[str, Mean]:
        """Move the teacher; returns the certificate's numbers, each a Mean of one."""
        distance_squared = torch.stack([squared_distance(s, t) for s, t in self.teacher.items()]).sum()
        reach = torch.stack([distance_squared, self._moved_squared, self._teacher_squared()])
        distance, moved, size = self.all_reduce(reach).sqrt().unbind()
        self._moved_squared.zero_()
        horizon = min(self.updates + 1, STEP_HORIZON)
        self.mean_step += (moved - self.mean_step) / horizon
        one_minus_alpha, guarded = self._decay(distance, size)
        for student, teacher in self.teacher.items():
            teacher.lerp_(student.detach(), one_minus_alpha.to(teacher.dtype))
        before, self.radius = self.radius, (1 - one_minus_alpha) * distance
        self.updates += 1
        report = {
            "ema/V": self.radius.square() / 2,
            "ema/delta_V": (self.radius.square() - before.square()) / 2,
            "ema/distance": distance,
            "ema/lag": distance / self.mean_step.clamp(min=1e-30),
            "ema/alpha": 1 - one_minus_alpha,
            "ema/guard_hit": guarded.double(),
        }
        return {name: Mean(value, 1.0) for name, value in report.items()}

    def state_dict(self) -> dict[str, float]:
        return {"radius": self.radius.item(), "mean_step": self.mean_step.item(), "updates": self.updates}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.radius.fill_(state["radius"])
        self.mean_step.fill_(state["mean_step"])
        self.updates = int(state["updates"])

    def _teacher_squared(self) -> Tensor:
        if self.config.norm != "relative":
            return torch.zeros_like(self.radius)
        return torch.stack([t.double().square().sum() for t in self.teacher.values()]).sum()

    def _decay(self, distance: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        """(1 - a, whether the guard was active); tensors throughout, so that a GPU is not waited for."""
        c = self.config
        if self.updates < c.warmup_steps:
            alpha = min(c.max_decay, (1 + self.updates) / (10 + self.updates))
            return torch.full_like(distance, 1 - alpha), torch.zeros_like(distance, dtype=torch.bool)
        if c.mode == "ema":
            return torch.full_like(distance, 1 - c.base_decay), torch.zeros_like(distance, dtype=torch.bool)
        one = torch.ones_like(distance)
        scale = {"l2": one, "rms": self.num_weights.sqrt(), "relative": size, "lag": self.mean_step}[c.norm]
        discrepancy = distance / scale.clamp(min=1e-30)
        offset = math.log(c.base_decay / (1 - c.base_decay))
        one_minus_alpha = torch.sigmoid(-(offset + c.gamma * discrepancy)).clamp(1 - c.max_decay, 1 - c.min_decay)
        if c.mode == "lyap":
            return one_minus_alpha, torch.zeros_like(distance, dtype=torch.bool)
        allowed = torch.maximum(self.radius, c.radius_steps * self.mean_step) * (1 - GUARD_SLACK)
        least = 1 - (allowed / distance.clamp(min=1e-30)).clamp(max=1.0)
        return torch.maximum(one_minus_alpha, least), least > one_minus_alpha


def squared_distance(a: Tensor, b: Tensor) -> Tensor:
    """Sum of squared differences, accumulated in fp64 from fp32 differences."""
    return (a.detach() - b).double().square().sum()


def _stepped(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """What this call of the optimizer moves: parameters without a gradient stay where they are."""
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
