"""Every implementation of the operators that this machine can run, and random inputs for their tests."""

import functools

import pytest
import torch
from torch import Tensor

from pipeline.ops import closed_form, reference
from pipeline.ops.choice import Operators
from pipeline.ops.fused import Fused
from pipeline.ops.native.build import SIMD, BuildError, best_simd
from pipeline.ops.native.library import Library

NAMES = ("torch", *(f"native-{simd}" for simd in SIMD))


@functools.cache
def operators(name: str) -> Operators:
    """Return the implementation `name`; skip the test where it cannot run."""
    if name == "torch":
        return Operators(name=name, scan=closed_form.selective_scan)
    simd = name.removeprefix("native-")
    if list(SIMD).index(simd) < list(SIMD).index(best_simd()):
        pytest.skip(f"this processor has no {simd}")
    try:
        fused = Fused(Library(simd))
    except BuildError as error:
        pytest.skip(str(error))
    return Operators(name=name, scan=fused.scan, conv=fused.conv, mixer=fused.mixer)


ORACLE = Operators(name="reference", scan=reference.selective_scan)


def scan_inputs(
    batch: int, channels: int, steps: int, states: int, groups: int | None = None, channels_last: bool = False
) -> list[Tensor]:
    """Return u, delta, A, B, C, D, z, delta_bias in the order of the signature."""
    generator = torch.Generator().manual_seed(channels * 1000 + steps)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def wide() -> Tensor:
        return normal(batch, steps, channels).transpose(1, 2) if channels_last else normal(batch, channels, steps)

    narrow = (batch, states, steps) if groups is None else (batch, groups, states, steps)
    A = -torch.rand(channels, states, generator=generator) * states - 0.1
    return [wide(), wide() - 2, A, normal(*narrow), normal(*narrow), normal(channels), wide(), normal(channels) * 0.1]


def outputs_and_gradients(function, inputs: list[Tensor | None], **options) -> list[Tensor]:
    """Return the outputs, then the gradients of a random linear function of them in the order of the inputs."""
    leaves = [
        None if x is None else x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in inputs
    ]
    results = function(*leaves, **options)
    results = results if isinstance(results, tuple) else (results,)
    generator = torch.Generator().manual_seed(7)
    loss = sum((r.double() * torch.randn(r.shape, generator=generator)).sum() for r in results)
    gradients = torch.autograd.grad(loss, [x for x in leaves if x is not None])
    return [t.detach() for t in (*results, *gradients)]


def relative_errors(got: list[Tensor], want: list[Tensor]) -> list[float]:
    """Return for each tensor the largest difference divided by the largest value, or by 1 if all values are 0.

    A NaN counts as infinite: Python's `max` over the errors may pass over a NaN.
    """
    return [
        float(((g.double() - w.double()).abs().max() / (w.double().abs().max() or 1.0)).nan_to_num(nan=float("inf")))
        for g, w in zip(got, want, strict=True)
        if w.numel()
    ]
