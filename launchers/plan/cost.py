"""The arithmetic of a plan: bytes per rank, bytes on disk, bytes on the wire (torch-free).

Everything follows from the sizes of the parameters, group by group as the optimizer has them, and from the networks of
the stage's workload. All state is fp32 (bf16 is autocast).
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.train.config import computed_stage

FP32, BF16 = 4, 2  # bytes
# What DeepSpeed 0.19 does, counted in elements.
BEGIN = 4  # ZeRO 1 and 2 put each parameter at a multiple of this, which is 16 bytes
ALIGNMENT = 2  # ZeRO 1 and 2 pad each group until every rank has a multiple of this
PERSISTENT = 100_000  # ZeRO 3 keeps smaller parameters whole on every rank


@dataclass(frozen=True)
class Parameter:
    """A trained parameter.

    Attributes:
        name: Its name.
        numel: Its number of elements.
        group: The index of its group in the optimizer.
        copied_bytes: Bytes of an element on its way to the inference copy of an average.
        moments: Names of what the optimizer keeps of each element; equal in a group.
        update_flops: FLOPs of Muon's products in an update; 0 for another optimizer.
    """

    name: str
    numel: int
    group: int
    copied_bytes: int = FP32
    moments: tuple[str, ...] = ("exp_avg", "exp_avg_sq")
    update_flops: int = 0

    @property
    def is_orthogonalised(self) -> bool:
        """Whether Muon steps it: it keeps an average of the gradient and no second moment."""
        return self.moments == ("exp_avg",)


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank.

    Attributes:
        parameters: Weights that compute.
        gradients: Gradients of all or of the rank's own parameters.
        masters: The rank's shard of the fp32 masters.
        moments: The rank's shard of the optimizer's moments.
        averages: The rank's shard of the averages of the weights (the teacher of stage 3, the average of stage 2).
        best: The rank's shard of the best state, with `loop.select=best`: a copy of the masters and of each average.
        inference_copies: The whole copies of these averages that compute.
        frozen: Whole frozen networks (a distillation teacher).
        buckets: Buckets of the reduction.
        activations: What is kept for the backward pass of one micro-batch.
        offloaded: Whether masters, moments and averages lie in the host's memory instead of the device's.
    """

    parameters: int
    gradients: int
    masters: int
    moments: int
    averages: int
    best: int
    inference_copies: int
    frozen: int
    buckets: int
    activations: int
    offloaded: bool = False

    @property
    def sharded(self) -> int:
        """Bytes of what ZeRO shards and may offload."""
        return self.masters + self.moments + self.averages + self.best

    @property
    def device(self) -> int:
        """Bytes in the device's memory."""
        resident = self.parameters + self.gradients + self.inference_copies + self.frozen + self.buckets
        return resident + self.activations + (0 if self.offloaded else self.sharded)

    @property
    def host(self) -> int:
        """Bytes in the host's memory, beside the process itself."""
        return self.sharded if self.offloaded else 0


def partition(parameters: Sequence[Parameter], zero_stage: int, world_size: int) -> int:
    """Count the elements of the fp32 masters (and of each moment) that one rank holds, padding included."""
    zero_stage = computed_stage(zero_stage, world_size)
    if zero_stage == 0:
        return sum(p.numel for p in parameters)
    if zero_stage == 3:
        return sum(-(-p.numel // world_size) for p in parameters)
    return sum(_laid_out(members, world_size)[1] for members in _groups(parameters))


def products_of_a_rank(parameters: Sequence[Parameter], world_size: int) -> float:
    """Count the least FLOPs of Muon's products on the rank that computes most.

    A matrix is computed whole, by one rank, and one group of parameters after another.
    """
    works = [[p.update_flops for p in members] for members in _groups(parameters)]
    return sum(max(sum(work) / world_size, max(work)) for work in works)


def held_moments(parameters: Sequence[Parameter], zero_stage: int, world_size: int) -> int:
    """Count the elements of all moments that one rank holds, padding included."""
    return sum(
        len(kept) * partition([p for p in parameters if p.moments == kept], zero_stage, world_size)
        for kept in {p.moments for p in parameters}
    )


def _groups(parameters: Sequence[Parameter]) -> list[list[Parameter]]:
    return [[p for p in parameters if p.group == group] for group in sorted({p.group for p in parameters})]


def _laid_out(members: Sequence[Parameter], world_size: int) -> tuple[list[int], int]:
    """Return where ZeRO 1 and 2 put the parameters of a group in its flat tensor, and how many elements of it a rank has."""
    places, end = [], 0
    for p in members:
        places.append(-(-end // BEGIN) * BEGIN)
        end = places[-1] + p.numel
    step = ALIGNMENT * world_size
    return places, -(-end // step) * step // world_size


@dataclass(frozen=True)
class Cut:
    """Elements of a parameter that one rank owns, and saves.

    Attributes:
        rank: The owner.
        name: The parameter.
        start: The first element, counted in the flattened parameter.
        numel: The number of elements.
    """

    rank: int
    name: str
    start: int
    numel: int


def cuts(parameters: Sequence[Parameter], zero_stage: int, world_size: int) -> list[Cut]:
    """List who owns which elements of the fp32 masters, as DeepSpeed cuts them; without ZeRO rank 0 saves all of them."""
    zero_stage = computed_stage(zero_stage, world_size)
    if zero_stage == 0:
        return [Cut(0, p.name, 0, p.numel) for p in parameters]
    found = []
    if zero_stage == 3:
        for p in parameters:
            share = -(-p.numel // world_size)
            found += [Cut(k, p.name, k * share, min(share, p.numel - k * share)) for k in range(-(-p.numel // share))]
        return found
    for members in _groups(parameters):
        places, share = _laid_out(members, world_size)
        for p, place in zip(members, places, strict=True):
            start = 0
            while start < p.numel:
                numel = min(share - place % share, p.numel - start)
                found.append(Cut(place // share, p.name, start, numel))
                start, place = start + numel, place + numel
    return found


def memory(
    parameters: Sequence[Parameter],
    *,
    zero_stage: int,
    world_size: int,
    averages: int,
    frozen_parameters: int,
    bucket_bytes: int,
    activations: int,
    offloaded: bool,
    keeps_best: bool = False,
) -> Memory:
    """Compute the memory of one rank.

    Args:
        parameters: The trained parameters.
        zero_stage: 0 to 3.
        world_size: The number of ranks.
        averages: Number of averages of the trained weights.
        frozen_parameters: Parameters of all frozen networks.
        bucket_bytes: Bytes that are reduced at once.
        activations: Bytes of one micro-batch.
        offloaded: Whether the optimizer lies in the host's memory.
        keeps_best: Whether the best state is kept beside the last.
    """
    zero_stage = computed_stage(zero_stage, world_size)
    total = sum(p.numel for p in parameters)
    own = partition(parameters, zero_stage, world_size)
    whole = sum(p.numel for p in parameters if p.numel < PERSISTENT)
    compute = own + whole if zero_stage == 3 else total
    return Memory(
        parameters=FP32 * compute,
        gradients=FP32 * (total if zero_stage < 2 else own),
        masters=FP32 * own if zero_stage else 0,  # without ZeRO the parameters are their own masters
        moments=FP32 * held_moments(parameters, zero_stage, world_size),
        averages=averages * FP32 * own,
        best=(1 + averages) * FP32 * own if keeps_best else 0,
        inference_copies=averages * FP32 * total,
        frozen=FP32 * frozen_parameters,
        buckets=bucket_bytes if zero_stage else 0,
        activations=activations,
        offloaded=offloaded,
    )


def checkpoint_bytes(parameters: Sequence[Parameter], kinds: Sequence[str]) -> int:
    """Count the bytes of all files of one checkpoint: the masters, their moments, the named averages, and the headers."""
    saved = [(kind, p) for p in parameters for kind in ("master", *p.moments, *kinds)]
    entry = {"dtype": "F32", "shape": [10_000], "data_offsets": [1_000_000, 1_000_000]}
    header = sum(len(json.dumps({f"{kind}/{p.name}@0": entry})) for kind, p in saved)
    return FP32 * sum(p.numel for _, p in saved) + header


def traffic(
    parameters: Sequence[Parameter],
    *,
    zero_stage: int,
    world_size: int,
    accumulation: int,
    averages: int,
    inferred: int = 0,
) -> int:
    """Count the bytes that a rank sends in one optimizer step, over rings.

    Gradients and weights travel as fp32, since bf16 is autocast; only to an inference copy does each travel in its own size.

    ZeRO 0 reduces all gradients. ZeRO 1 reduces and scatters them and gathers the weights. ZeRO 2 does so for every
    micro-batch. ZeRO 3 gathers the weights for every forward and backward pass. ZeRO 1 and 2 gather the inference copy of
    each average once, ZeRO 3 around each of its forward passes; without ZeRO every rank has it. Muon's updates are
    gathered at ZeRO 1 to 3, and what each rank has made of its share of them is sent to all.

    Args:
        parameters: The trained parameters.
        zero_stage: 0 to 3.
        world_size: The number of ranks.
        accumulation: Micro-batches per step.
        averages: Number of averages of the trained weights.
        inferred: Those of them that predict in a step.
    """
    to_others = (world_size - 1) / world_size
    once = FP32 * sum(p.numel for p in parameters) * to_others
    copied = sum(p.copied_bytes * p.numel for p in parameters) * to_others
    passes = {0: 2, 1: 2, 2: accumulation + 1, 3: 3 * accumulation}[zero_stage]
    orthogonalised = sum(p.numel for p in parameters if p.is_orthogonalised)
    updates = FP32 * orthogonalised * to_others * (2 if zero_stage else 1)
    return round(once * passes + updates + copied * {0: 0, 3: inferred * accumulation}.get(zero_stage, averages))


def collectives(
    parameters: Sequence[Parameter], *, zero_stage: int, bucket_bytes: int, accumulation: int, averages: int
) -> int:
    """Count the collectives of one optimizer step: buckets of gradients, gathers of weights and averages, Muon's, norm, vote."""
    buckets = -(-FP32 * sum(p.numel for p in parameters) // bucket_bytes)
    reduced = buckets * (accumulation if zero_stage > 1 else 1)
    gathered = {0: 0, 3: 2 * accumulation * len(parameters)}.get(zero_stage, buckets + averages)
    orthogonalised = len({p.group for p in parameters if p.is_orthogonalised}) * (2 if zero_stage else 1)
    return reduced + gathered + orthogonalised + 2


def starts_needed(seconds: float, limit: float, overhead: float) -> int:
    """Count the starts that a run takes, each of at most `limit` seconds, of which `overhead` go to starting and saving.

    Returns:
        The number of starts; 0 if a start leaves no time to work in.
    """
    useful = limit - overhead
    return math.ceil(seconds / useful) if useful > 0 else 0
