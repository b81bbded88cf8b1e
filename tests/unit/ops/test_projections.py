"""The compiled projections of a mixer and their gradients are those of float64, and no bit depends on the threads."""

from functools import cache

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from pipeline.ops.kernels import Projections
from pipeline.ops.native.build import SIMD, BuildError, best_simd
from pipeline.ops.native.library import Library
from pipeline.ops.projections import TorchProjections
from tests.unit.ops.test_vision import few

# The names of what `both_ways` returns: the outputs, the gradients that it wrote or added to, and those of the weights.
FOUND = ("projected", "delta", "g_projected", "g_u", "g_x_proj", "g_dt_proj")


@cache
def kernels_for(simd: str) -> Library:
    if [*SIMD].index(simd) < [*SIMD].index(best_simd()):
        pytest.skip(f"this processor has no {simd}")
    try:
        return Library(simd)
    except BuildError as error:
        pytest.skip(str(error))


def inputs_of(rows: int, channels: int, rank: int, states: int) -> list[Tensor]:
    """Return u, x_proj, dt_proj and the gradients at delta, `projected` and u."""
    generator = torch.Generator().manual_seed(rows * 1000 + channels)
    width = rank + 2 * states
    shapes = [(rows, channels), (width, channels), (channels, rank), (rows, channels), (rows, width), (rows, channels)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def both_ways(kernels: TorchProjections, inputs: list[Tensor]) -> list[Tensor]:
    u, x_proj, dt_proj, g_delta, g_projected, g_u = (t.clone() for t in inputs)  # with their strides
    projected, delta = kernels.project(u[None], x_proj, dt_proj)
    weights = kernels.project_backward(Projections(u, x_proj, dt_proj, projected[0]), g_delta, g_projected, g_u)
    return [projected[0], delta[0], g_projected, g_u, *weights]


def in_float64(inputs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Return what `both_ways` computes in float64, and each result's sum of the sizes of its terms."""
    results = []
    for u, x_proj, dt_proj, g_delta, g_projected, g_u in (
        [t.double() for t in inputs],
        [t.double().abs() for t in inputs],
    ):
        rank = dt_proj.shape[1]
        projected = u @ x_proj.t()
        g_projected = torch.cat([g_delta @ dt_proj, g_projected[:, rank:]], dim=1)
        g_u, low = g_u + g_projected @ x_proj, projected[:, :rank]
        results.append([projected, low @ dt_proj.t(), g_projected, g_u, g_projected.t() @ u, g_delta.t() @ low])
    return results[0], results[1]


@few
@example(rows=600, channels=100, rank=40, states=20, threads=3)
@example(rows=2000, channels=300, rank=19, states=16, threads=2)
@given(
    rows=st.integers(0, 600),
    channels=st.integers(1, 100),
    rank=st.integers(1, 40),
    states=st.integers(1, 20),
    threads=st.integers(1, 5),
)
@pytest.mark.parametrize("simd", [*SIMD])
def test_they_and_their_gradients_are_those_of_float64(
    simd: str, rows: int, channels: int, rank: int, states: int, threads: int
) -> None:
    kernels, inputs = kernels_for(simd), inputs_of(rows, channels, rank, states)
    torch.set_num_threads(threads)
    found = both_ways(kernels, inputs)
    torch.set_num_threads(1)
    alone = both_ways(kernels, inputs)
    for name, got, want, terms, single in zip(FOUND, found, *in_float64(inputs), alone, strict=True):
        assert got.shape == want.shape, name
        assert ((got - want).abs() <= 2e-6 * terms + 1e-30).all(), name
        assert simd == "baseline" or torch.equal(got, single), name  # the baseline's products are torch's


@pytest.mark.parametrize("simd", [*SIMD])
def test_a_nan_stays_in_its_row(simd: str) -> None:
    inputs = inputs_of(40, 20, 3, 5)
    inputs[0][7, 19] = inputs[3][7, 19] = float("nan")
    projected, delta, g_projected, g_u, *_ = both_ways(kernels_for(simd), inputs)
    others = [row for row in range(40) if row != 7]
    for tensor in (projected, delta, g_projected, g_u):
        assert torch.isfinite(tensor[others]).all()
    assert projected[7].isnan().all()
    assert delta[7].isnan().all()


@pytest.mark.parametrize("which", range(6))
def test_other_layouts_and_dtypes_go_to_torch(which: int) -> None:
    kernels, inputs = kernels_for(best_simd()), inputs_of(30, 24, 2, 4)
    inputs[which] = inputs[which].t().contiguous().t()
    for got, want in zip(both_ways(kernels, inputs), both_ways(TorchProjections(), inputs), strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    halves = [t.bfloat16() for t in inputs]
    for got, want in zip(both_ways(kernels, halves), both_ways(TorchProjections(), halves), strict=True):
        assert torch.equal(got, want)
