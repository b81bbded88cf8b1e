"""The compiled blocks of Vision Mamba equal float64 within rounding, for every instruction set of this machine."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pipeline.ops import reference
from pipeline.ops.native.mamba import Block, Blocks, Norm, SwiGLU
from pipeline.ops.reference import Direction
from tests.unit.ops.test_vision import SETS, assert_near, draw, few, library


def norm_of(width: int, kind: str) -> Norm:
    return Norm(1e-5, draw(30, width), draw(31, width) if kind == "layer" else None)


def normed(x: Tensor, norm: Norm) -> Tensor:
    """The norm in torch, in float64."""
    x, weight = x.double(), norm.weight.double()
    if norm.bias is None:
        return F.rms_norm(x, x.shape[-1:], weight, norm.eps)
    return F.layer_norm(x, x.shape[-1:], weight, norm.bias.double(), norm.eps)


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


def swiglu_of(width: int, hidden: int, kind: str) -> SwiGLU:
    one, two = ((draw(k, hidden, width) / width**0.5, draw(k + 1, hidden)) for k in (40, 42))
    return SwiGLU(norm_of(width, kind), one, two, (draw(44, width, hidden) / hidden**0.5, draw(45, width)))


def after_swiglu(x: Tensor, layer: SwiGLU) -> Tensor:
    """The SwiGLU in torch, in float64."""
    t = normed(x, layer.norm)
    a, b, *_ = (F.linear(t, w.double(), bias.double()) for w, bias in (layer.one, layer.two))
    return x + F.linear(F.silu(a) * b, *(p.double() for p in layer.three))


def at_threads(threads: int, layer: Blocks, x: Tensor) -> Tensor:
    torch.set_num_threads(threads)
    return layer(x.clone())


@few
@given(
    batch=st.integers(1, 5),
    steps=st.integers(1, 60),
    width=st.integers(6, 70),  # a layer norm of two numbers that nearly agree enlarges their rounding
    inner=st.integers(1, 80),
    states=st.integers(1, 33),
    rank=st.integers(1, 40),
    taps=st.integers(1, 8),
    count=st.sampled_from([1, 2, 4]),
    norm=st.sampled_from(["rms", "layer"]),
    hidden=st.one_of(st.none(), st.integers(1, 150)),
    threads=st.integers(1, 5),
)
@pytest.mark.parametrize("simd", SETS)
def test_a_block(
    simd: str,
    batch: int,
    steps: int,
    width: int,
    inner: int,
    states: int,
    rank: int,
    taps: int,
    count: int,
    norm: str,
    hidden: int | None,
    threads: int,
) -> None:
    """Images and directions are divided among the threads in three ways, by their numbers; all give the same bits."""
    directions = [direction_of(10 * k, inner, states, rank, taps) for k in range(count)]
    orders = [torch.randperm(steps, generator=torch.Generator().manual_seed(k)) for k in range(count)]
    before, project, join = norm_of(width, norm), draw(97, 2 * inner, width) / width**0.5, draw(98, width, inner)
    swiglu = swiglu_of(width, hidden, norm) if hidden else None
    block = Block(before, project, list(zip(directions, orders, strict=True)), join, swiglu, library(simd))
    x, layer = draw(99, batch, steps, width), Blocks([block], library(simd))
    found = at_threads(threads, layer, x)
    assert torch.equal(at_threads(1, layer, x), found)
    assert torch.equal(torch.cat([layer(image.clone()[None]) for image in x]), found)

    xz = F.linear(normed(x, before), project.double())
    y = sum(scanned(xz, d, order) for d, order in zip(directions, orders, strict=True))
    want = x.double() + F.linear(y * F.silu(xz[..., inner:]), join.double())
    assert_near(found, after_swiglu(want, swiglu) if swiglu else want, 1e-5)


def small(simd: str, seed: int = 0) -> Block:
    order, direction, norm = torch.arange(20), direction_of(seed, 16, 8, 4, 4), norm_of(12, "rms")
    return Block(norm, draw(seed + 7, 32, 12), [(direction, order)], draw(seed + 8, 12, 16), None, library(simd))


@pytest.mark.parametrize("simd", SETS)
def test_a_nan_stays_in_its_image_and_reaches_what_follows_it(simd: str) -> None:
    x = draw(1, 2, 20, 12)
    x[1, 7, 3] = float("nan")
    y = Blocks([small(simd)], library(simd))(x)
    assert torch.isfinite(y[0]).all()
    assert torch.isfinite(y[1, :7]).all()
    assert y[1, 7:].isnan().all()


@pytest.mark.parametrize("simd", SETS)
def test_blocks_run_one_after_another(simd: str) -> None:
    x, blocks = draw(1, 3, 20, 12), [small(simd), small(simd, 10)]
    one, two = (Blocks([block], library(simd)) for block in blocks)
    assert torch.equal(Blocks(blocks, library(simd))(x.clone()), two(one(x.clone())))


def test_a_copy_has_its_own_weights_and_a_changed_type_is_refused() -> None:
    layer, x = Blocks([small(SETS[-1])], library(SETS[-1])), draw(1, 1, 20, 12)
    want = layer(x.clone())
    other = copy.deepcopy(layer)
    for weight in layer.buffers():
        if (
            weight.is_floating_point()
        ):  # the orders of the tokens must name each token, else memory is read that nothing wrote
            weight.zero_()
    assert torch.equal(layer(x.clone()), x)
    assert torch.equal(other(x.clone()), want)
    other.load_state_dict(dict(layer.state_dict()), assign=True)
    assert torch.equal(other(x.clone()), x)
    with pytest.raises(ValueError, match=r"compiled layers take fp32 on the CPU, not torch\.float64"):
        other.double()(x)
