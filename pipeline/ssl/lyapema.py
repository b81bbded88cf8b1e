"""LyapEMA: a teacher moved by an average whose decay answers to the discrepancy |s - t| (Semi-ViM, supplement eq. 3-5).

With s the student before a step, s' after it (the pull included), t the teacher, r = s - t, d = s' - t, and the energy
V = |r|^2 / 2, every mode moves the teacher by one rule, t' = a t + (1 - a) s'. Only a differs.

The identity, whatever the student did: r' = s' - t' = s' - a t - (1 - a) s' = a (s' - t) = a d, so V' = a^2 |d|^2 / 2.
The bound: with the pull lambda and a step of the optimizer of length m at most, d = (1 - lambda) r + that step, so
|r'| <= a ((1 - lambda) |r| + m). For decays up to A < 1, or up to 1 with a pull, V therefore falls wherever
|r| > M = A m / (1 - A (1 - lambda)), and in the limit |r| <= M; below M it may grow.

- `ema`      a = base_decay, or a ramp to final_decay: the bound, with the larger of both for A.
- `lyap`     a = sigmoid(b + gamma rho), b = logit(base_decay), clamped to [min_decay, max_decay]; rho = |d| in the chosen
             norm, or (`energy`, the README's words) the fall (|r|^2 - |d|^2) / 2 of V in the student's step, in the
             norm squared. The bound, with max_decay for A: as printed, where it is 1, only a pull gives one. V' <= V does
             not follow: from s = t, any step with a > 0 raises V from 0. So the supplement's eq. (7),
             V' - V = -eta |g|^2 - lambda |r|^2, is no theorem: after a gradient step s' = s - eta g - lambda r the
             identity gives 2 (V' - V) = (a^2 (1 - lambda)^2 - 1) |r|^2 - 2 a^2 (1 - lambda) eta <r, g> + a^2 eta^2 |g|^2,
             whose cross term has no sign and whose last term has the other one.
- `guarded`  also a <= max(|r|, R) / |d|. Then |r'| = a |d| <= max(|r|, R), so V' <= max(V, R^2 / 2): outside a ball of
             radius R the energy never grows, and who is inside stays inside. The guard is no stricter than it must be: a
             larger a gives |r'| > max(|r|, R). R = radius_steps x the mean student step, so the ball grows and shrinks
             with the steps, and over a whole run V <= max(V_0, R_max^2 / 2); with R = 0 a teacher that once equals its
             student would equal it for ever. In the first `warmup_steps` updates nothing is guarded, only measured: the
             certificate begins with the V that they leave.

W = L + lambda / (2 eta) |r|^2. Under gradient descent eq. (3) is a step of size eta on W in s, whose gradient is Lipschitz
with beta + lambda / eta where L's is with beta; so if L is fixed and eta beta + lambda <= 1, W(s', t) <= W(s, t) - eta / 2
|grad W|^2 (the descent lemma), and the teacher's move lowers it further, since |r'| = a |d| <= |d|: W falls in every mode.
AdamW's step is no gradient step and a minibatch no fixed loss: there W is a diagnostic.

Rounding. The teacher is computed in its own precision, of unit roundoff u: t' is off by at most E = u (|t| + 16 |d|)
(one rounding of a number of t's size, a few of d's in lerp, and |d| itself is off by 8 u |d| at most). The guard
therefore keeps a lower bound of |r|, a |d| - E of the last update, and allows a <= (max(bound, R) - E) / |d|: then the
inequality holds for the numbers that are stored, not only for the real ones they stand for. 1 - a is computed as
sigmoid(-x), which stays above zero where sigmoid(x) rounds to one.

The pull lambda (t - s) is applied inside the next optimizer step, before AdamW's update, so no compute copy goes stale
(AdamW's own weight decay then acts on the pulled weight: a term of order lr x decay x lambda apart from eq. 3).
The teacher lies beside the optimizer's fp32 masters, so ZeRO shards it: 4P/N bytes a rank, three all-reduced scalars a step.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.ops.distance import squared_distance_and_size
from pipeline.ssl.config import LyapEMAConfig
from pipeline.train.task import Mean

# The student's step is measured in each of the first updates and then every so often, which costs a copy of the masters;
# its mean is over the last four measurements.
MEASURE_EVERY = 25
MEASUREMENTS = 4
# The unit of the teacher's move on a CPU: large enough for a thread team, small enough that what was just read is still cached.
CHUNK = 2**20


class LyapEMA:
    """The fp32 teacher and its certificate. Call `update` after each real optimizer step.

    `masters`: the fp32 tensors that `optimizer` steps, this rank's part of the weights; `all_reduce` sums a tensor over
    the owners of the other parts; `num_weights` counts the whole, for norm rms. The teacher is {master: its average},
    laid out alike.
    """

    def __init__(
        self,
        masters: Sequence[Tensor],
        optimizer: torch.optim.Optimizer,
        config: LyapEMAConfig,
        all_reduce: Callable[[Tensor], Tensor] = lambda x: x,
        num_weights: int | None = None,
    ) -> None:
        self.config, self.all_reduce, self.optimizer = config, all_reduce, optimizer
        self.teacher = {master: master.detach().clone() for master in masters}
        self.num_weights = num_weights or sum(master.numel() for master in masters)
        zero = torch.zeros((), dtype=torch.float64, device=masters[0].device)
        self.radius, self.radius_bound, self.mean_step = zero.clone(), zero.clone(), zero.clone()
        self.one_minus_alpha = zero.clone()  # of the last update
        self.updates = 0
        self._unit_roundoff = torch.finfo(masters[0].dtype).eps / 2
        self._moved_squared = zero.clone()
        self._before: dict[Tensor, Tensor] = {}
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)

    @property
    def measures_step(self) -> bool:
        """Whether the next student step is measured: only where a radius or a lag is counted in steps, and not every time."""
        return self._counts_in_steps and (self.updates < MEASURE_EVERY or self.updates % MEASURE_EVERY == 0)

    @property
    def _counts_in_steps(self) -> bool:
        return self.config.mode == "guarded" or (self.config.mode == "lyap" and self.config.norm == "lag")

    # DeepSpeed steps the optimizer group by group; the hooks see the groups of one call, so a copy is of one group.
    def _before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        # Without a teacher: a rank's part of a group that is all padding.
        flats = [flat for flat in _stepped(optimizer) if flat in self.teacher]
        if self.measures_step:
            self._before |= {flat: flat.detach().clone() for flat in flats}
        if self.config.pull and flats:
            with torch.no_grad():
                torch._foreach_lerp_(flats, [self.teacher[flat] for flat in flats], self.config.pull)

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for flat in _stepped(optimizer):
            if flat in self._before:
                self._moved_squared += squared_distance_and_size([flat], [self._before.pop(flat)])[0]

    def update(self, loss: Tensor | None = None) -> dict[str, Mean]:
        """Move the teacher; returns the certificate's numbers, each a Mean of one. `loss`, of the step, completes W."""
        reach = squared_distance_and_size(list(self.teacher), list(self.teacher.values()))
        distance, size, moved = self.all_reduce(torch.cat([reach, self._moved_squared[None]])).sqrt().unbind()
        if self.measures_step:
            self.mean_step += (moved - self.mean_step) / min(self.updates + 1, _horizon(self.updates))
        self._moved_squared.zero_()
        rounding = self._unit_roundoff * (size + 16 * distance)
        self.one_minus_alpha, guarded = self._decay(distance, size, rounding)
        self._move()
        before, self.radius = self.radius, (1 - self.one_minus_alpha) * distance
        self.radius_bound = (self.radius - rounding).clamp(min=0)
        self.updates += 1
        report = {
            "ema/V": self.radius.square() / 2,
            "ema/delta_V": (self.radius.square() - before.square()) / 2,
            "ema/r": before,
            "ema/d": distance,
            "ema/alpha": 1 - self.one_minus_alpha,
            "ema/guard_hit": guarded.double(),
        }
        if self._counts_in_steps:
            report["ema/lag"] = distance / self.mean_step.clamp(min=1e-30)
        if loss is not None:
            report["ema/W"] = loss.double() + self.config.pull / (2 * self._lr()) * before.square()
        return {name: Mean(value, 1.0) for name, value in report.items()}

    def state_dict(self) -> dict[str, float]:
        numbers = {name: float(getattr(self, name)) for name in ("radius", "radius_bound", "mean_step")}
        return {**numbers, "updates": self.updates}

    def load_state_dict(self, state: dict[str, float]) -> None:
        for name in ("radius", "radius_bound", "mean_step"):
            getattr(self, name).fill_(state[name])
        self.updates = int(state["updates"])

    def _move(self) -> None:
        """t += (1 - a)(s - t), backwards: the end of what was measured last is still in the cache."""
        if self.one_minus_alpha.device.type != "cpu":  # reading the number would wait for the device
            for student, teacher in self.teacher.items():
                teacher.lerp_(student.detach(), self.one_minus_alpha.to(teacher.dtype))
            return
        averages: list[Tensor] = []
        latest: list[Tensor] = []
        with torch.no_grad():
            for student, teacher in reversed(self.teacher.items()):
                if teacher.numel() <= CHUNK:
                    averages.append(teacher)
                    latest.append(student)
                else:
                    averages += reversed(teacher.view(-1).split(CHUNK))
                    latest += reversed(student.view(-1).split(CHUNK))
            torch._foreach_lerp_(averages, latest, float(self.one_minus_alpha))

    def _decay(self, distance: Tensor, size: Tensor, rounding: Tensor) -> tuple[Tensor, Tensor]:
        """(1 - a, whether the guard was active); tensors throughout, so that a GPU is not waited for."""
        c = self.config
        free = torch.zeros_like(distance, dtype=torch.bool)
        if c.mode == "ema" or self.updates < c.warmup_steps:
            return torch.full_like(distance, 1 - self._scheduled()), free
        one = torch.ones_like(distance)
        scales = {"l2": one, "rms": one * math.sqrt(self.num_weights), "relative": size, "lag": self.mean_step}
        scale = scales[c.norm].clamp(min=1e-30)
        if c.signal == "discrepancy":
            answered = distance / scale
        else:
            answered = (self.radius.square() - distance.square()) / (2 * scale.square())
        offset = math.log(c.base_decay / (1 - c.base_decay))
        one_minus_alpha = torch.sigmoid(-(offset + c.gamma * answered)).clamp(1 - c.max_decay, 1 - c.min_decay)
        if c.mode == "lyap":
            return one_minus_alpha, free
        allowed = (torch.maximum(self.radius_bound, c.radius_steps * self.mean_step) - rounding).clamp(min=0)
        least = 1 - (allowed / distance.clamp(min=1e-30)).clamp(max=1.0)
        return torch.maximum(one_minus_alpha, least), least > one_minus_alpha

    def _scheduled(self) -> float:
        """The decay that answers to nothing: of mode ema, and of the warm-up."""
        c, k = self.config, self.updates
        decay = c.max_decay
        if c.mode == "ema":
            done = min(1.0, k / c.ramp_steps) if c.ramp_steps else 0.0
            decay = c.base_decay + ((c.final_decay or c.base_decay) - c.base_decay) * (1 - math.cos(math.pi * done)) / 2
        return min(decay, (1 + k) / (10 + k)) if k < c.warmup_steps else decay

    def _lr(self) -> float:
        """eta: the largest rate of the last step (that of the last layer, under layer-wise decay)."""
        return max(max(group["lr"] for group in self.optimizer.param_groups), 1e-30)


def _horizon(updates: int) -> int:
    return MEASURE_EVERY if updates < MEASURE_EVERY else MEASUREMENTS


def _stepped(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """What this call of the optimizer moves: parameters without a gradient stay where they are."""
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
