"""What an implementation must compute before it is used, and how fast it is: small cases of the operators and their gradients."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.ops import reference
from pipeline.ops.composed import composed_mixer
from pipeline.ops.reference import Direction

Mixer = Callable[..., tuple[Tensor, ...]]
BATCH, STEPS, CHANNELS, STATES, RANK = 2, 19, 20, 5, 3
# The shape that kernels are timed on: Vim-Small at 224 pixels, in bf16 on a GPU.
TIMED = {"batch": 32, "steps": 197, "channels": 768, "states": 16, "rank": 24}
WARM_UP, ROUNDS = 3, 9


def worst_error(scan: Callable[..., Any], mixer: Mixer | None, device: torch.device) -> float:
    """Return the largest relative error to the reference over all outputs and gradients.

    A reversed scan and, if there is one, a mixer of two directions run without autocast and under a bf16 autocast. The inputs are
    fp32, which the operators promise to keep.
    """
    cases = [(_scan_loss(scan), _scan_loss(reference.selective_scan), _scan_inputs(device))]
    if mixer is not None:
        expected = composed_mixer(reference.selective_scan, reference.causal_conv1d_silu)
        inputs = mixer_inputs(device, torch.float32, BATCH, STEPS, CHANNELS, STATES, RANK)
        cases.append((_mixer_loss(mixer), _mixer_loss(expected), inputs))
    errors = []
    for found, expected_loss, inputs in cases:
        wanted = _results(expected_loss, inputs, autocast=False)
        for autocast in (False, True):
            for got, want in zip(_results(found, inputs, autocast=autocast), wanted, strict=True):
                errors.append(((got - want).abs().max() / want.abs().max()).detach())
    return max(float(error.nan_to_num(nan=float("inf"))) for error in errors)  # `max` may pass over a NaN


def step_seconds(mixer: Mixer, device: torch.device, **shape: int) -> float:
    """Return the median time of forward and backward of a mixer of two directions.

    Args:
        mixer: The mixer.
        device: Where it computes; the host waits for it.
        **shape: What differs from TIMED.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    leaves = [x.requires_grad_() for x in mixer_inputs(device, dtype, **(TIMED | shape))]
    times = []
    for _ in range(WARM_UP + ROUNDS):
        _finish(device)
        begin = time.perf_counter()
        with torch.enable_grad():
            (out,) = mixer(leaves[0], directions_of(leaves), blend=None, return_ungated=False)
            torch.autograd.grad(out, leaves, torch.ones_like(out))
        _finish(device)
        times.append(time.perf_counter() - begin)
    return statistics.median(times[WARM_UP:])


def mixer_inputs(
    device: torch.device, dtype: torch.dtype, batch: int, steps: int, channels: int, states: int, rank: int
) -> list[Tensor]:
    """Return xz in `dtype`, then the seven weights of each of two directions in fp32."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    found = [normal(batch, steps, 2 * channels).to(dtype)]
    for _ in range(2):
        found += [normal(channels, 1, 4) * 0.5, normal(channels) * 0.1, normal(rank + 2 * states, channels) * 0.2]
        found += [normal(channels, rank) * 0.2, normal(channels) - 2, -normal(channels, states).exp(), normal(channels)]
    return [x.to(device) for x in found]


def directions_of(inputs: Sequence[Tensor]) -> list[Direction]:
    """Return the two directions among `mixer_inputs`."""
    return [Direction(*inputs[1:8]), Direction(*inputs[8:])]


def _scan_inputs(device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    wide, narrow = (BATCH, CHANNELS, STEPS), (BATCH, STATES, STEPS)
    shapes = [wide, wide, (CHANNELS, STATES), narrow, narrow, (CHANNELS,), wide, (CHANNELS,)]
    values = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
    values[2] = -values[2].exp()
    return values


def _scan_loss(scan: Callable[..., Any]) -> Callable[..., tuple[Tensor, ...]]:
    return lambda *inputs: scan(*inputs, reverse=True, return_ungated=True)


def _mixer_loss(mixer: Mixer) -> Callable[..., tuple[Tensor, ...]]:
    return lambda *inputs: mixer(inputs[0], directions_of(inputs), blend=None, return_ungated=True)


def _results(function: Callable[..., tuple[Tensor, ...]], values: Sequence[Tensor], *, autocast: bool) -> list[Tensor]:
    """Return the outputs, and the gradients of a function of them that is not linear."""
    inputs = [value.clone().requires_grad_() for value in values]
    with torch.enable_grad(), torch.autocast(values[0].device.type, dtype=torch.bfloat16, enabled=autocast):
        out, *ungated = function(*inputs)
        loss = sum(((out * p.cos()).sum() for p in ungated), start=out.new_zeros(()))
        return [out, *ungated, *torch.autograd.grad(loss, inputs)]


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
