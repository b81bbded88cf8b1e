"""LyapEMA: a teacher moved by an average whose decay follows the discrepancy |s - t| (Semi-ViM, supplement eq. 3-5).

Let s be the student before a step, s' the student after it (the pull included), t the teacher, r = s - t, d = s' - t, and
V = |r|^2 / 2 the energy. Every mode moves the teacher by one rule, t' = a t + (1 - a) s'. Only a differs.

The identity holds whatever the student did: r' = s' - t' = s' - a t - (1 - a) s' = a (s' - t) = a d, so V' = a^2 |d|^2 / 2.

The bound: with the pull lambda and an optimizer step of length m at most, d = (1 - lambda) r + that step, so
|r'| <= a ((1 - lambda) |r| + m). For decays up to A < 1, or up to 1 with a pull, V therefore falls wherever
|r| > M = A m / (1 - A (1 - lambda)), and in the limit |r| <= M. Below M it may grow.

- `ema`      a = base_decay, or a ramp to final_decay. The bound holds with the larger of both for A.
- `lyap`     a = sigmoid(b + gamma rho), b = logit(base_decay), clamped to [min_decay, max_decay]. rho is |d| in the chosen
             norm, or with the signal `energy` (the README's words) the fall (|r|^2 - |d|^2) / 2 of V in the student's step,
             in the norm squared. The bound holds with max_decay for A; as printed, where that is 1, only a pull gives a
             bound. V' <= V does not follow: from s = t, any step with a > 0 raises V from 0. So the supplement's eq. (7),
             V' - V = -eta |g|^2 - lambda |r|^2, is no theorem. After a gradient step s' = s - eta g - lambda r the
             identity gives 2 (V' - V) = (a^2 (1 - lambda)^2 - 1) |r|^2 - 2 a^2 (1 - lambda) eta <r, g> + a^2 eta^2 |g|^2.
             Its cross term has no sign, and its last term has the other sign.
- `guarded`  also a <= max(|r|, R) / |d|. Then |r'| = a |d| <= max(|r|, R), so V' <= max(V, R^2 / 2). Outside a ball of
             radius R the energy never grows, and a teacher inside the ball stays inside. The guard is no stricter than it
             must be: a larger a gives |r'| > max(|r|, R). R = radius_steps x the mean student step, so the ball grows and
             shrinks with the steps, and over a whole run V <= max(V_0, R_max^2 / 2). With R = 0 a teacher that once equals
             its student would equal it for ever. In the first `warmup_steps` updates nothing is guarded, only measured; the
             certificate begins with the V that they leave.

The released code has a third rule (`preset: released`). It is `lyap` with the signal `energy`: a = sigmoid(-kappa (V_d - V)),
where V_d = |d|^2 / 2 is the energy before the teacher moves, V the one that the last update left, kappa = gamma. The first
update has a = 1/2 exactly. Where V' >= V_d, which it tests after the move, it restores the teacher, halves the learning rate
and multiplies kappa by 1.5, for good. Since V' = a^2 V_d that happens only where d = 0, or where a rounds to one in fp32. Its
pull is a term lambda |s - t|^2 of the loss, so its gradient 2 lambda (s - t) goes through the optimizer. We add that gradient
after the clipping, and lambda |r|^2 is in no logged loss but in `ema/penalty`. The bound above is for the other pull.

W = L + lambda / (2 eta) |r|^2. Under gradient descent eq. (3) is a step of size eta on W in s. The gradient of W is Lipschitz
with beta + lambda / eta if that of L is with beta. So if L is fixed and eta beta + lambda <= 1, then
W(s', t) <= W(s, t) - eta / 2 |grad W|^2 (the descent lemma). The teacher's move lowers W further, since |r'| = a |d| <= |d|: W
falls in every mode. AdamW's step is no gradient step and the loss of a minibatch is not fixed, so there W is a diagnostic.

Rounding. The teacher is computed in its own precision, of unit roundoff u. So t' is off by at most E = u (|t| + 16 |d|): one
rounding of a number of t's size, a few of d's size in lerp, and |d| itself is off by 8 u |d| at most. The guard therefore
keeps a lower bound of |r|, which is a |d| - E of the last update, and allows a <= (max(bound, R) - E) / |d|. Then the
inequality holds for the stored numbers, not only for the real numbers that they approximate. 1 - a is computed as
sigmoid(-x), which stays above zero where sigmoid(x) rounds to one.

The pull lambda (t - s) is applied inside the next optimizer step, before AdamW's update, so no compute copy goes stale.
AdamW's own weight decay then acts on the pulled weight, which differs from eq. 3 by a term of order lr x decay x lambda.
The teacher lies beside the optimizer's fp32 masters, so ZeRO shards it: 4P/N bytes per rank, three all-reduced scalars per step.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.ops.distance import squared_distance_and_size
from pipeline.ssl.config import LyapEMAConfig
from pipeline.train.task import Mean

# The student's step is measured in each of the first MEASURE_EVERY updates and then in every MEASURE_EVERY-th, which costs a
# copy of the masters. Its mean is taken over the last MEASUREMENTS.
MEASURE_EVERY = 25
MEASUREMENTS = 4
# The released code multiplies the learning rate and kappa by these at each rollback.
ROLLBACK_LR, ROLLBACK_GAMMA = 0.5, 1.5
_STATE = ("radius", "radius_bound", "mean_step", "rollbacks")
# Elements that a CPU moves at once: enough for a thread team, few enough to be still in the cache after the measurement.
CHUNK = 2**20


class LyapEMA:
    """The fp32 teacher and its certificate. Call `update` after each real optimizer step.

    The teacher is {master: its average}, in the layout of the masters.

    Args:
        masters: The fp32 tensors that `optimizer` steps: this rank's shards of the weights.
        optimizer: The student's optimizer; it gets two hooks.
        config: The rule.
        all_reduce: Sums a tensor over the owners of all shards.
        num_weights: Number of weights of the whole model, for the norm rms; None = those of `masters`.
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
        self.one_minus_alpha = zero.clone()  # the student's weight in the last update
        self.rollbacks = zero.clone()
        self._rates: list[float] = []
        self._used = torch.ones_like(zero)  # what the rates of the last step were multiplied by
        self.updates = 0
        self._unit_roundoff = torch.finfo(masters[0].dtype).eps / 2
        self._moved_squared = zero.clone()
        self._before: dict[Tensor, Tensor] = {}
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)

    @property
    def measures_step(self) -> bool:
        """Whether the next student step is measured; only modes that count a radius or a lag in steps need it."""
        return self._counts_in_steps and (self.updates < MEASURE_EVERY or self.updates % MEASURE_EVERY == 0)

    @property
    def _counts_in_steps(self) -> bool:
        return self.config.mode == "guarded" or (self.config.mode == "lyap" and self.config.norm == "lag")

    # DeepSpeed steps the optimizer group by group; the hooks see the groups of one call, so they copy one group at a time.
    def _before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        # A rank's slice of a group that is all padding has no teacher.
        flats = [flat for flat in _stepped(optimizer) if flat in self.teacher]
        if self.measures_step:
            self._before |= {flat: flat.detach().clone() for flat in flats}
        if self.config.pull and flats:
            averages = [self.teacher[flat] for flat in flats]
            with torch.no_grad():
                if self.config.pull_as == "step":
                    torch._foreach_lerp_(flats, averages, self.config.pull)
                else:
                    gradients = [flat.grad for flat in flats if flat.grad is not None]
                    torch._foreach_add_(gradients, torch._foreach_sub(flats, averages), alpha=2 * self.config.pull)
        if self.config.rollback:  # the hook after the step restores the rates: groups may be seen in several calls
            self._rates = [group["lr"] for group in optimizer.param_groups]
            self._used = factor = self._lr_factor()
            # A fused optimizer reads a rate that is a tensor on the GPU itself; here the host would wait for it.
            known = float(factor) if factor.device.type == "cpu" else factor.float()
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * known

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if self.config.rollback:
            for group, rate in zip(optimizer.param_groups, self._rates, strict=True):
                group["lr"] = rate
        for flat in _stepped(optimizer):
            if flat in self._before:
                self._moved_squared += squared_distance_and_size([flat], [self._before.pop(flat)])[0]

    def measure(self) -> None:
        """Measure |s - t| of a teacher that does not start as its student (collective)."""
        reach = squared_distance_and_size(list(self.teacher), list(self.teacher.values()))
        distance, size = self.all_reduce(reach).sqrt().unbind()
        self.radius = distance
        self.radius_bound = (distance - self._rounding(distance, size)).clamp(min=0)

    def lr_factor(self) -> float:
        """Return what the learning rate of the last step was multiplied by. With `rollback` it waits for the device."""
        return float(self._used) if self.config.rollback else 1.0

    def update(self, loss: Tensor | None = None) -> dict[str, Mean]:
        """Move the teacher (collective).

        Args:
            loss: Scalar loss of the step, which completes W; None leaves W out.

        Returns:
            The certificate's numbers, each a Mean of one value.
        """
        reach = squared_distance_and_size(list(self.teacher), list(self.teacher.values()))
        distance, size, moved = self.all_reduce(torch.cat([reach, self._moved_squared[None]])).sqrt().unbind()
        if self.measures_step:
            self.mean_step += (moved - self.mean_step) / min(self.updates + 1, _horizon(self.updates))
        self._moved_squared.zero_()
        rounding = self._rounding(distance, size)
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
        if self.config.rollback:
            report |= {"ema/rollbacks": self.rollbacks.clone(), "ema/lr_factor": self._lr_factor()}
        proximal = before.square() * (
            self.config.pull if self.config.pull_as == "loss" else self.config.pull / (2 * self._lr())
        )
        if self.config.pull_as == "loss":
            report["ema/penalty"] = proximal
        if loss is not None:
            report["ema/W"] = loss.double() + proximal
        return {name: Mean(value, 1.0) for name, value in report.items()}

    def state_dict(self) -> dict[str, float]:
        """Return the numbers that the next update needs, equal on all ranks."""
        return {name: float(getattr(self, name)) for name in _STATE} | {"updates": self.updates}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore what `state_dict` returned."""
        for name in _STATE:
            getattr(self, name).fill_(state[name])
        self.updates = int(state["updates"])

    def _rounding(self, distance: Tensor, size: Tensor) -> Tensor:
        return self._unit_roundoff * (size + 16 * distance)

    def _move(self) -> None:
        """Move t += (1 - a)(s - t), last tensors first: what was measured last is still in the cache."""
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
        """(1 - a, whether the guard was active), as tensors, so that nothing waits for a GPU."""
        c = self.config
        free = torch.zeros_like(distance, dtype=torch.bool)
        if c.mode == "ema" or self.updates < c.warmup_steps:
            return torch.full_like(distance, 1 - self._scheduled()), free
        one = torch.ones_like(distance)
        scales = {"l2": one, "rms": one * math.sqrt(self.num_weights), "relative": size, "lag": self.mean_step}
        scale = scales[c.norm].clamp(min=1e-30)
        if c.signal == "discrepancy":
            response = distance / scale
        else:
            response = (self.radius.square() - distance.square()) / (2 * scale.square())
        if self.updates < c.signal_after:
            response = torch.zeros_like(response)
        offset = math.log(c.base_decay / (1 - c.base_decay))
        argument = offset + c.gamma * ROLLBACK_GAMMA**self.rollbacks * response
        one_minus_alpha = torch.sigmoid(-argument).clamp(1 - c.max_decay, 1 - c.min_decay)
        if c.rollback:
            stays = (distance == 0) | (torch.sigmoid(argument.float()) == 1)  # V' >= V as fp32 computes it
            self.rollbacks += stays
            return one_minus_alpha * ~stays, free
        if c.mode == "lyap":
            return one_minus_alpha, free
        allowed = (torch.maximum(self.radius_bound, c.radius_steps * self.mean_step) - rounding).clamp(min=0)
        least = 1 - (allowed / distance.clamp(min=1e-30)).clamp(max=1.0)
        return torch.maximum(one_minus_alpha, least), least > one_minus_alpha

    def _scheduled(self) -> float:
        """The decay that does not depend on the discrepancy: that of mode ema and of the warm-up."""
        c, k = self.config, self.updates
        decay = c.max_decay
        if c.mode == "ema":
            done = min(1.0, k / c.ramp_steps) if c.ramp_steps else 0.0
            decay = c.base_decay + ((c.final_decay or c.base_decay) - c.base_decay) * (1 - math.cos(math.pi * done)) / 2
        return min(decay, (1 + k) / (10 + k)) if k < c.warmup_steps else decay

    def _lr_factor(self) -> Tensor:
        return ROLLBACK_LR**self.rollbacks

    def _lr(self) -> float:
        """The largest learning rate of the last step (under layer decay, that of the last layer), eta in W."""
        return max(max(group["lr"] for group in self.optimizer.param_groups), 1e-30)


def _horizon(updates: int) -> int:
    return MEASURE_EVERY if updates < MEASURE_EVERY else MEASUREMENTS


def _stepped(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The tensors that this call of the optimizer moves: those with a gradient."""
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
