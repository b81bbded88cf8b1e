"""The compiled layers of Vision Mamba equal float64 within rounding, for every instruction set of this machine."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pipeline.ops import reference
from pipeline.ops.native.mamba import GatedLinear, Memory, Norm, NormedLinear, NormedSwiGLU, Scans
from pipeline.ops.native.vision_library import padded
from pipeline.ops.reference import Direction
from tests.unit.ops.test_vision import SETS, assert_near, draw, few, library, sizes


def norm_of(width: int, kind: str) -> Norm:
    return Norm(1e-5, draw(30, width), draw(31, width) if kind == "layer" else None)


def normed(x: Tensor, norm: Norm) -> Tensor:
    """The norm in torch, in float64."""
    x, weight = x.double(), norm.weight.double()
    if norm.bias is None:
        return F.rms_norm(x, x.shape[-1:], weight, norm.eps)
    return F.layer_norm(x, x.shape[-1:], weight, norm.bias.double(), norm.eps)


@few
@given(count=sizes, inputs=st.integers(2, 90), outputs=st.integers(1, 140), kind=st.sampled_from(["rms", "layer"]))
@pytest.mark.parametrize("simd", SETS)
def test_a_projection_with_its_norm(simd: str, count: int, inputs: int, outputs: int, kind: str) -> None:
    x, w, b, norm = draw(0, count, inputs), draw(1, outputs, inputs), draw(2, outputs), norm_of(inputs, kind)
    assert_near(
        NormedLinear(norm, w, b, library(simd))(x, Memory()), F.linear(normed(x, norm), w.double(), b.double()), 5e-6
    )


@few
@given(count=sizes, width=st.integers(2, 70), hidden=st.integers(1, 150), kind=st.sampled_from(["rms", "layer"]))
@pytest.mark.parametrize("simd", SETS)
def test_swiglu_with_its_norm(simd: str, count: int, width: int, hidden: int, kind: str) -> None:
    one, two = ((draw(k, hidden, width) / 8, draw(k + 1, hidden)) for k in (0, 2))
    three, norm, x = (draw(4, width, hidden) / 8, draw(5, width)), norm_of(width, kind), draw(6, count, width)
    t = normed(x, norm)
    a, b = (F.linear(t, w.double(), bias.double()) for w, bias in (one, two))
    want = x.double() + F.linear(F.silu(a) * b, *(p.double() for p in three))
    NormedSwiGLU(norm, one, two, three, library(simd))(x)
    assert_near(x, want, 5e-6)


def direction_of(seed: int, inner: int, states: int, rank: int, taps: int) -> Direction:
    return Direction(
        draw(seed, inner, 1, taps) / 2,
        draw(seed + 1, inner) / 4,
        draw(seed + 2, rank + 2 * states, inner) / inner**0.5,
        draw(seed + 3, inner, rank) / rank**0.5,
        draw(seed + 4, inner) - 2,
        -draw(seed + 5, inner, states).abs() * states - 0.1,
        draw(seed + 6, inner),
    )


def in_rows(y: Tensor, inner: int) -> Tensor:
    """What `Scans` gives, as (directions, B, L, E)."""
    return y.transpose(2, 3).flatten(3)[..., :inner]


def in_blocks(y: Tensor, lanes: int) -> Tensor:
    """(directions, B, L, E) as `Scans` gives it: what it does not write may hold anything."""
    inner = y.shape[3]
    written = F.pad(y, (0, -inner % lanes))
    whole = F.pad(written, (0, padded(inner) - written.shape[3]), value=float("nan"))
    return whole.unflatten(3, (-1, lanes)).transpose(2, 3).contiguous()


def scanned(xz: Tensor, d: Direction, order: Tensor) -> Tensor:
    """One direction step by step in float64, without gate: (B, L, E)."""
    weights = Direction(*(None if t is None else t.double() for t in d))
    x = xz.double()[:, order, : xz.shape[2] // 2].transpose(1, 2)
    v = reference.causal_conv1d_silu(x, weights.conv_weight, weights.conv_bias)
    rank, states = weights.dt_proj.shape[1], weights.A.shape[1]
    low, B, C = F.linear(v.transpose(1, 2), weights.x_proj).split([rank, states, states], dim=2)
    delta = F.linear(low, weights.dt_proj).transpose(1, 2)
    y = reference.selective_scan(
        v, delta, weights.A, B.transpose(1, 2), C.transpose(1, 2), weights.D, delta_bias=weights.dt_bias
    )
    return y.transpose(1, 2)[:, order.argsort()]


@few
@given(
    batch=st.integers(1, 3),
    steps=st.integers(1, 100),
    inner=st.integers(1, 80),
    states=st.integers(1, 33),
    rank=st.integers(1, 40),
    taps=st.integers(1, 8),
    count=st.sampled_from([1, 2, 4]),
    threads=st.integers(1, 5),
)
@pytest.mark.parametrize("simd", SETS)
def test_the_scans_of_all_directions(
    simd: str, batch: int, steps: int, inner: int, states: int, rank: int, taps: int, count: int, threads: int
) -> None:
    """With more threads than images and directions, the same bits go through memory instead of the cache."""
    directions = [direction_of(10 * k, inner, states, rank, taps) for k in range(count)]
    orders = [torch.randperm(steps, generator=torch.Generator().manual_seed(k)) for k in range(count)]
    xz, layer, before = draw(99, batch, steps, 2 * inner), Scans(directions, library(simd)), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = in_rows(layer(xz, orders, Memory()), inner)
        torch.set_num_threads(1)
        assert torch.equal(in_rows(layer(xz, orders, Memory()), inner), found)
    finally:
        torch.set_num_threads(before)
    assert_near(found, torch.stack([scanned(xz, d, order) for d, order in zip(directions, orders, strict=True)]), 1e-5)


@few
@given(batch=st.integers(1, 3), count=sizes, inner=sizes, outputs=sizes, directions=st.sampled_from([1, 2, 4]))
@pytest.mark.parametrize("simd", SETS)
def test_gate_and_out_projection(simd: str, batch: int, count: int, inner: int, outputs: int, directions: int) -> None:
    y, xz = draw(0, directions, batch, count, inner), draw(1, batch, count, 2 * inner)
    x, weight = draw(2, batch, count, outputs), draw(3, outputs, inner)
    gated = y.double().sum(0) * F.silu(xz.double()[..., inner:])
    want = x + F.linear(gated, weight.double())
    layer = GatedLinear(weight, library(simd))
    layer(in_blocks(y, layer.library.panel // 2), xz, x)
    assert_near(x, want, 5e-6)


@pytest.mark.parametrize("simd", SETS)
def test_a_nan_stays_in_its_image_and_reaches_what_follows_it(simd: str) -> None:
    layer, steps = Scans([direction_of(0, 16, 8, 4, 4)], library(simd)), torch.arange(20)
    xz = draw(1, 2, 20, 32)
    xz[1, 7, 3] = float("nan")
    y = in_rows(layer(xz, [steps], Memory()), 16)[0]
    assert torch.isfinite(y[0]).all()
    assert torch.isfinite(y[1, :7]).all()
    assert y[1, 7:].isnan().all()
