"""Muon: the update of a weight matrix is made orthogonal, so that all directions of its outputs learn at once.

A gradient is nearly of low rank: it changes a matrix along few directions. Muon (Jordan et al. 2024,
https://kellerjordan.github.io/posts/muon/) replaces the averaged gradient G = U S V' (its singular value decomposition, V' the
transpose of V) by about U V', which changes it along all of them alike.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from pipeline.ops.linear import linear
from pipeline.train.distributed import World, gather_uneven
from pipeline.train.shard import Shard

# Newton and Schulz's iteration X -> a X + (b XX' + c (XX')^2) X. Five of it bring each singular value from [0.01, 1] to between
# 0.68 and 1.13; smaller ones stay smaller. The coefficients are Jordan's.
ITERATION, ITERATIONS = (3.4445, -4.7750, 2.0315), 5
# The entries of an orthogonal matrix (m, n) have a root mean square of 1 / sqrt(max(m, n)), those of an update of AdamW one of
# about 0.2. Scaled to that, matrices and vectors share a learning rate and a weight decay (Liu et al. 2025, "Muon is Scalable for
# LLM Training", eq. 4).
ADAMW_RMS = 0.2
# Multiply-adds of a product from which matrices are computed one by one on a CPU; below, calls cost more than they save.
_LARGE = 2**22

Orthogonalise = Callable[[tuple[str, ...], Mapping[Tensor, Tensor]], None]


class Muon(torch.optim.Optimizer):
    """Muon for the groups that have `names`, and AdamW for the others (vectors, tokens, depthwise kernels, the classifier).

    As Jordan's, the update looks ahead along its momentum (Nesterov). Deviations: it has the size of AdamW's updates, and the
    weights decay (both as Liu et al.); the rate of the momentum is AdamW's first beta.

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
        # AdamW has the same dicts, whose tensors DeepSpeed replaces, and writes into the same state. It is no parent class: torch
        # calls the hooks of an optimizer at each `step` of its classes, and would clip twice.
        others = [group for group in self.param_groups if not group["names"]]
        self._adamw = torch.optim.AdamW(others, lr=lr, betas=betas, eps=eps, fused=True) if others else None
        self.orthogonalise: Orthogonalise = _whole

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the weights."""
        for group in self.param_groups:
            if group["names"] and group["params"]:  # DeepSpeed empties the groups that a call leaves out
                self._step_matrices(group)
        if self._adamw is not None:
            self._adamw.param_groups = [group for group in self.param_groups if not group["names"]]
            self._adamw.state = self.state
            self._adamw.step()

    def _step_matrices(self, group: dict[str, Any]) -> None:
        """W -= lr (wd W + 0.2 sqrt(max(m, n)) orthogonal(b M + (1 - b) G)) with the momentum M = b M + (1 - b) G."""
        weights = [weight for weight in group["params"] if weight.grad is not None]
        if not weights:  # on no rank, since DeepSpeed gives zeros to what no gradient has reached
            return
        gradients = [weight.grad for weight in weights]
        beta, rate = group["betas"][0], group["lr"]  # a rollback of LyapEMA makes the rate a number on the device
        for weight in weights:
            if not self.state[weight]:
                self.state[weight]["exp_avg"] = torch.zeros_like(weight)
        averages = [self.state[weight]["exp_avg"] for weight in weights]
        torch._foreach_lerp_(averages, gradients, 1 - beta)
        updates = torch._foreach_lerp(gradients, averages, beta)
        self.orthogonalise(group["names"], dict(zip(weights, updates, strict=True)))
        torch._foreach_mul_(weights, 1 - rate * group["weight_decay"])
        torch._foreach_mul_(updates, rate)
        torch._foreach_sub_(weights, updates)


def _whole(names: tuple[str, ...], updates: Mapping[Tensor, Tensor]) -> None:
    """Orthogonalise updates of parameters that nothing has cut."""
    orthogonalise(list(updates.values()))


class Cut(Protocol):
    """What Muon asks of the engine that cuts the weights (`engine.Engine`)."""

    world: World
    shards: list[Shard]

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Trained parameter -> its shape."""

    def gather(self, tensors: Mapping[Tensor, Tensor], into: Mapping[str, Tensor]) -> None:
        """Assemble whole parameters from the ranks' slices (collective)."""


def over_shards(engine: Cut) -> Orthogonalise:
    """Return what orthogonalises the updates of an engine's matrices, which are cut as their masters are (collective).

    All ranks gather the updates of a group. Each matrix is computed by one rank and sent to all, so the work is divided at every
    ZeRO stage, and no two ranks round a matrix differently.
    """
    divided: dict[tuple[str, ...], Divided] = {}

    def replace(names: tuple[str, ...], updates: Mapping[Tensor, Tensor]) -> None:
        if names not in divided:
            divided[names] = Divided(engine, names)
        divided[names](updates)

    return replace


class Divided:
    """Some matrices, and the rank that computes each.

    Args:
        engine: The engine, with its shards.
        names: The matrices, on all ranks the same.
    """

    def __init__(self, engine: Cut, names: Sequence[str]) -> None:
        self.engine = engine
        shapes, asked = engine.shapes, set(names)
        self.shapes = {name: shapes[name] for name in names}
        self.own = [shard for shard in engine.shards if shard.name in asked]
        self.shares: list[list[str]] = [[] for _ in range(engine.world.size)]
        loads = [0] * engine.world.size
        for name in sorted(names, key=lambda name: (-product_flops(self.shapes[name]), name)):
            rank = loads.index(min(loads))
            self.shares[rank].append(name)
            loads[rank] += product_flops(self.shapes[name])

    @torch.no_grad()
    def __call__(self, updates: Mapping[Tensor, Tensor]) -> None:
        """Replace the updates, {master: the update of its layout} (collective)."""
        device = self.engine.world.device
        whole = {name: torch.empty(shape, device=device) for name, shape in self.shapes.items()}
        self.engine.gather(updates, whole)
        orthogonalise([whole[name] for name in self.shares[self.engine.world.rank]])
        if self.engine.world.size > 1:
            self._send(whole)
        if self.own:  # a rank may own nothing of a small group
            slices = [whole[shard.name].view(-1).narrow(0, shard.start, shard.numel) for shard in self.own]
            torch._foreach_copy_([shard.of(updates[shard.flat]) for shard in self.own], slices)

    def _send(self, whole: Mapping[str, Tensor]) -> None:
        """Send each rank's share to all others."""
        own = [whole[name].flatten() for name in self.shares[self.engine.world.rank]]
        flat = torch.cat(own) if own else torch.empty(0, device=self.engine.world.device)
        numels = [[self.shapes[name].numel() for name in share] for share in self.shares]
        for share, numel, row in zip(self.shares, numels, gather_uneven(flat, list(map(sum, numels))), strict=True):
            if share:  # with fewer matrices than ranks some compute none
                torch._foreach_copy_([whole[name].view(-1) for name in share], list(row.split(numel)))


def product_flops(shape: torch.Size) -> int:
    """Count the FLOPs that make the update of a matrix (m, n, ...) orthogonal: 5 (4 m^2 n + 2 m^3) with m <= n.

    A CPU takes fewer for large matrices that are at least twice as wide as high (`_by_square`).
    """
    m, n = sorted((shape[0], shape.numel() // shape[0]))
    return ITERATIONS * 2 * m * m * (2 * n + m)


def orthogonalise(updates: Sequence[Tensor]) -> None:
    """Replace each matrix in place by 0.2 sqrt(max(m, n)) times about the nearest orthogonal one.

    Matrices of equal shape are computed together, on a GPU in bf16, as Jordan does.

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
    x = matrices / torch.linalg.matrix_norm(matrices, keepdim=True).clamp(min=1e-30)
    if x.device.type == "cpu" and x.shape[1] * x[0].numel() >= _LARGE:
        one = _by_square if x.shape[2] >= 2 * x.shape[1] else _by_linear
        return torch.stack([one(matrix) for matrix in x])
    a, b, c = ITERATION
    if x.device.type == "cuda":
        x = x.bfloat16()
    for _ in range(ITERATIONS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.to(matrices.dtype)


def _by_linear(x: Tensor) -> Tensor:
    """Iterate one matrix (m, n) by the products of `pipeline.ops.linear`, which on some processors take half the time."""
    for _ in range(ITERATIONS):
        x = linear(_factor(linear(x, x)), x.t())
    return x


def _by_square(x: Tensor) -> Tensor:
    """Iterate a wide matrix (m, n) by S = X X' (m, m) alone: only two of the products are n long, in place of ten.

    A step multiplies X by F of `_factor`. It commutes with S, so S becomes F S F, and the product of all steps' F multiplies X
    once. Rounding grows where S is small: to about a percent of the result for an X of rank 1 or 2, less at higher rank (a test
    has the bounds).
    """
    square = linear(x, x)
    factor = whole = _factor(square)
    for _ in range(ITERATIONS - 1):
        square = linear(linear(factor, square), factor)
        factor = _factor(square)
        whole = linear(whole, factor)
    return linear(whole, x.t())


def _factor(square: Tensor) -> Tensor:
    """Return F = a + b S + c S^2 (m, m), symmetric as S is."""
    a, b, c = ITERATION
    factor = torch.add(b * square, linear(square, square), alpha=c)
    factor.diagonal().add_(a)
    return factor
