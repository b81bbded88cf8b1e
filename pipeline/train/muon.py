"""Muon: the update of a weight matrix is made orthogonal, so that all directions of its outputs learn at once.

A gradient is nearly of low rank, and AdamW moves a matrix along few directions. Muon (Jordan et al. 2024,
https://kellerjordan.github.io/posts/muon/) replaces the averaged gradient G = U S V' by about U V'. Few steps then learn more.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pipeline.train.engine import Engine

# Newton and Schulz's iteration X -> a X + (b XX' + c (XX')^2) X brings each singular value from (0, 1] to about 1: between 0.68
# and 1.13. The coefficients are Jordan's; they rise fastest at 0.
ITERATION, ITERATIONS = (3.4445, -4.7750, 2.0315), 5
# An orthogonal matrix (m, n) has entries of root mean square 1 / sqrt(max(m, n)), and an update of AdamW about this. So scaled,
# one learning rate and one weight decay serve both (Liu et al. 2025, "Muon is Scalable for LLM Training", eq. 4).
ADAMW_RMS = 0.2

Orthogonalise = Callable[[Sequence[str], Mapping[Tensor, Tensor]], None]


class Muon(torch.optim.Optimizer):
    """Muon for the groups that have `names`, and AdamW for the others (vectors, tokens, depthwise kernels, the classifier).

    Deviations from Jordan: the updates have the size of AdamW's, so the learning rate is AdamW's too; the momentum is the average
    of AdamW, with its first beta.

    Args:
        groups: From `parameter_groups`.
        lr: Learning rate.
        betas: Decay rates of AdamW's two moments; the first is Muon's momentum too.
        eps: AdamW's term in the denominator.

    Attributes:
        orthogonalise: (names, {tensor of a group: its update}) -> nothing. It replaces the update of each named matrix in place.
            The engine sets it, since ZeRO cuts matrices; it is collective.
    """

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas})
        # It has the same dicts as this optimizer, whose tensors DeepSpeed replaces, and writes into the same state. It is no
        # parent class: torch calls the hooks of an optimizer at each `step` of its classes, and would clip twice.
        others = [group for group in self.param_groups if not group["names"]]
        self._adamw = torch.optim.AdamW(others, lr=lr, betas=betas, eps=eps, fused=True)
        self.orthogonalise: Orthogonalise = _whole

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the weights."""
        for group in self.param_groups:
            if group["names"] and group["params"]:  # DeepSpeed empties the groups that a call leaves out
                self._step_matrices(group)
        self._adamw.param_groups = [group for group in self.param_groups if not group["names"]]
        self._adamw.state = self.state
        self._adamw.step()

    def _step_matrices(self, group: dict[str, Any]) -> None:
        """W -= lr (wd W + 0.2 sqrt(max(m, n)) orthogonal(b M + (1 - b) G)) with the momentum M = b M + (1 - b) G."""
        weights = [weight for weight in group["params"] if weight.grad is not None]
        gradients = [weight.grad for weight in weights]
        beta, rate = group["betas"][0], group["lr"]  # a rollback of LyapEMA makes the rate a number on the device
        for weight in weights:
            if not self.state[weight]:
                self.state[weight]["exp_avg"] = torch.zeros_like(weight)
        averages = [self.state[weight]["exp_avg"] for weight in weights]
        torch._foreach_lerp_(averages, gradients, 1 - beta)
        updates = list(torch._foreach_lerp(gradients, averages, beta))
        self.orthogonalise(group["names"], dict(zip(weights, updates, strict=True)))
        torch._foreach_mul_(weights, 1 - rate * group["weight_decay"])
        torch._foreach_mul_(updates, rate)
        torch._foreach_sub_(weights, updates)


def _whole(names: Sequence[str], updates: Mapping[Tensor, Tensor]) -> None:
    """Orthogonalise updates of parameters that nothing has cut."""
    orthogonalise(list(updates.values()))


def over_shards(engine: "Engine") -> Orthogonalise:
    """Return what orthogonalises the updates of an engine's matrices, which are cut as their masters are (collective).

    All ranks gather all matrices of a group. Each computes those of which it owns a slice: with ZeRO a share of them, else all.
    """

    def replace(names: Sequence[str], updates: Mapping[Tensor, Tensor]) -> None:
        own = [shard for shard in engine.shards if shard.name in names and shard.flat in updates]
        computed = list(dict.fromkeys(shard.name for shard in own))
        asked = computed if engine.config.zero_stage == 0 else names  # there, a rank owns all, or what has a gradient
        shapes = engine.shapes
        whole = {name: torch.empty(shapes[name], device=engine.world.device) for name in asked}
        if whole:
            engine.gather(updates, whole)
        orthogonalise([whole[name] for name in computed])
        slices = [whole[shard.name].view(-1).narrow(0, shard.start, shard.numel) for shard in own]
        with torch.no_grad():
            torch._foreach_copy_([shard.of(updates[shard.flat]) for shard in own], slices)

    return replace


def orthogonalise(updates: Sequence[Tensor]) -> None:
    """Replace each matrix in place by 0.2 sqrt(max(m, n)) times about the nearest orthogonal one.

    Matrices of equal shape are computed together. On a GPU the products are of bf16, as Jordan's.

    Args:
        updates: (m, n, ...) each; the dimensions behind the first are one.
    """
    alike: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
    for update in updates:
        matrix = update.flatten(1)
        wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
        alike[wide.shape[0], wide.shape[1]].append(wide)
    for (_, longest), matrices in alike.items():
        found = _orthogonal(torch.stack(matrices)) * (ADAMW_RMS * longest**0.5)
        torch._foreach_copy_(matrices, list(found))


def _orthogonal(matrices: Tensor) -> Tensor:
    """Return about U V' of each of the matrices (k, m, n) = U S V' with m <= n; of zeros it is zero."""
    a, b, c = ITERATION
    x = matrices / torch.linalg.matrix_norm(matrices, keepdim=True).clamp(min=1e-30)
    if x.device.type == "cuda":
        x = x.bfloat16()
    for _ in range(ITERATIONS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.to(matrices.dtype)
