"""The compiled layers of EfficientViM equal float64 within rounding, for every instruction set of this machine."""

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.ops.native.build import SIMD, best_simd
from pipeline.ops.native.stem import MapConv, Stem
from pipeline.ops.native.vision import ACTIVATIONS, Depthwise, FeedForward, Linear, Mixer, Widen
from pipeline.ops.native.vision_library import VisionLibrary

SETS = list(SIMD)[list(SIMD).index(best_simd()) :]
ACTS = {"none": lambda y: y, "relu": F.relu, "silu": F.silu, "sigmoid": torch.sigmoid}
sizes = st.integers(1, 70)
few = settings(max_examples=25, deadline=None)


@cache
def library(simd: str) -> VisionLibrary:
    return VisionLibrary(simd)


@pytest.fixture(params=SETS)
def lib(request: pytest.FixtureRequest) -> VisionLibrary:
    return library(request.param)


def assert_near(got: Tensor, want: Tensor, tolerance: float = 2e-6) -> None:
    assert got.shape == want.shape
    assert got.dtype == torch.float32
    error = float((got - want).abs().max() / want.abs().max().clamp(min=1))
    assert error <= tolerance, error


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows(x: Tensor) -> Tensor:
    """(B, C, H, W) -> a map (B, H, W, C)."""
    return x.permute(0, 2, 3, 1).contiguous()


def locals_of(channels: int) -> tuple[Tensor, Tensor]:
    """Return weight and bias of a depthwise convolution."""
    return draw(20, channels, 1, 3, 3) / 3, draw(21, channels)


def convolved(x: Tensor, local: tuple[Tensor, Tensor]) -> Tensor:
    weight, bias = local
    return rows(F.conv2d(x.double().permute(0, 3, 1, 2), weight.double(), bias.double(), 1, 1, groups=len(bias)))


@few
@given(count=sizes, inputs=sizes, outputs=st.integers(1, 140), act=st.sampled_from(ACTIVATIONS), seed=st.integers(0, 9))
@pytest.mark.parametrize("simd", SETS)
def test_linear(simd: str, count: int, inputs: int, outputs: int, act: str, seed: int) -> None:
    x, w, b = draw(seed, count, inputs), draw(seed + 1, outputs, inputs), draw(seed + 2, outputs)
    assert_near(Linear(w, b, act, library(simd))(x), ACTS[act](F.linear(x.double(), w.double(), b.double())))


@few
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 12), st.integers(1, 12), sizes),
    hidden=st.integers(1, 200),
)
@pytest.mark.parametrize("simd", SETS)
def test_feed_forward(simd: str, shape: tuple[int, int, int, int], hidden: int) -> None:
    channels = shape[-1]
    x, w1, w2 = draw(0, *shape), draw(1, hidden, channels) / 8, draw(2, channels, hidden) / 8
    b1, b2, local = draw(3, hidden), draw(4, channels), locals_of(channels)
    t = convolved(x, local)
    h = F.relu(F.linear(t, w1.double(), b1.double()))
    assert_near(FeedForward(local, w1, b1, w2, b2, library(simd))(x), t + F.linear(h, w2.double(), b2.double()))


@few
@given(shape=st.tuples(st.integers(1, 4), st.integers(1, 12), st.integers(1, 12), sizes), outputs=sizes)
@pytest.mark.parametrize("simd", SETS)
def test_widen(simd: str, shape: tuple[int, int, int, int], outputs: int) -> None:
    x, w, b, (taps, taps_bias) = draw(0, *shape), draw(1, outputs, shape[-1]), draw(2, outputs), locals_of(outputs)
    wide = F.relu(F.linear(x.double(), w.double(), b.double())).permute(0, 3, 1, 2)
    want = F.relu(F.conv2d(wide, taps.double(), taps_bias.double(), 2, 1, groups=outputs))
    assert_near(Widen(w, b, taps, taps_bias, library(simd))(x), rows(want))


@few
@given(shape=st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(1, 12), sizes))
@pytest.mark.parametrize("simd", SETS)
def test_depthwise(simd: str, shape: tuple[int, int, int, int]) -> None:
    x, local = draw(0, *shape), locals_of(shape[-1])
    assert_near(Depthwise(local, library(simd))(x), convolved(x, local))


@few
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 70), st.integers(1, 70)),
    middle=st.sampled_from((16, 28, 32)),
    outputs=st.integers(1, 70),
)
@pytest.mark.parametrize("simd", SETS)
def test_stem(simd: str, shape: tuple[int, int, int, int], middle: int, outputs: int) -> None:
    x = draw(0, *shape)
    w1, b1, w2, b2 = (
        draw(1, middle, shape[1], 3, 3),
        draw(2, middle),
        draw(3, outputs, middle, 3, 3) / 9,
        draw(4, outputs),
    )
    between = F.relu(F.conv2d(x.double(), w1.double(), b1.double(), 2, 1))
    want = F.conv2d(between, w2.double(), b2.double(), 2, 1)
    assert_near(Stem((w1, b1, "relu"), (w2, b2, "none"), library=library(simd))(x), rows(want))


@few
@given(
    batch=st.integers(1, 3),
    channels=st.sampled_from((16, 28, 32, 48, 56, 112)),
    height=st.integers(1, 19),
    width=st.integers(1, 19),
    outputs=st.integers(1, 70),
    act=st.sampled_from(("none", "relu")),
)
@pytest.mark.parametrize("simd", SETS)
def test_map_conv(simd: str, batch: int, channels: int, height: int, width: int, outputs: int, act: str) -> None:
    x, w, b = draw(0, batch, channels, height, width), draw(1, outputs, channels, 3, 3), draw(2, outputs)
    want = ACTS[act](F.conv2d(x.double(), w.double(), b.double(), 2, 1))
    assert_near(MapConv(w, b, act, library(simd))(rows(x)), rows(want))


def mixer_of(
    channels: int, groups: tuple[int, int, int], inner: int, lib: VisionLibrary, seed: int = 0
) -> tuple[Mixer, tuple[Tensor, Tensor], dict[str, Tensor]]:
    """Return a mixer, its depthwise convolution and its weights."""
    local, total = locals_of(channels), sum(groups)
    weights = {
        "gamma": draw(seed + 1, channels),
        "beta": draw(seed + 2, channels),
        "project": draw(seed + 3, total, channels) / channels**0.5,
        "spread": draw(seed + 4, total, 1, 3, 3) / 3,
        "skip": draw(seed + 5, inner),
        "to_h": draw(seed + 6, inner, channels) / channels**0.5,
        "to_gate": draw(seed + 7, inner, channels) / channels**0.5,
        "to_out": draw(seed + 8, channels, inner) / inner**0.5,
    }
    return Mixer(local, rows=groups, eps=1e-5, **weights, library=lib), local, weights


@few
@given(
    batch=st.integers(1, 3),
    channels=st.integers(1, 70),
    states=st.integers(1, 40),
    single=st.booleans(),
    inner=sizes,
    height=st.integers(1, 9),
    width=st.integers(1, 9),
)
@pytest.mark.parametrize("simd", SETS)
def test_mixer(
    simd: str, batch: int, channels: int, states: int, single: bool, inner: int, height: int, width: int
) -> None:
    groups = states, states, 1 if single else states
    mixer, local, given_ = mixer_of(channels, groups, inner, library(simd))
    x, total = draw(0, batch, height, width, channels), sum(groups)
    d = {name: value.double() for name, value in given_.items()}
    first = convolved(x, local)
    t = F.layer_norm(first, (channels,), d["gamma"], d["beta"], 1e-5)
    spread = F.conv2d((t @ d["project"].t()).permute(0, 3, 1, 2), d["spread"], None, 1, 1, groups=total)
    b, c, delta = spread.flatten(2).split(groups, 1)
    s = (delta.softmax(-1) * b) @ t.flatten(1, 2)
    h = ((s @ d["to_h"].t()) * (F.silu(s @ d["to_gate"].t()) + d["skip"])) @ d["to_out"].t()
    y = first + (c.transpose(1, 2) @ h).view(x.shape)
    got_y, got_h = mixer(x)
    assert_near(got_h, h, 2e-5)
    assert_near(got_y, y, 2e-5)


@pytest.mark.parametrize("simd", SETS)
def test_threads_change_no_bit(simd: str) -> None:
    lib, x, images = library(simd), draw(0, 3, 30, 22, 56), draw(9, 3, 3, 90, 70)
    stem = Stem((draw(10, 28, 3, 3, 3), None, "relu"), (draw(11, 56, 28, 3, 3), None, "relu"), library=lib)
    layers = [
        MapConv(draw(1, 70, 56, 3, 3), None, "relu", lib),
        Depthwise(locals_of(56), lib),
        Linear(draw(3, 100, 56), None, "silu", lib),
        FeedForward(locals_of(56), draw(4, 224, 56), draw(5, 224), draw(6, 56, 224), draw(7, 56), lib),
        Widen(draw(8, 100, 56), draw(9, 100), *locals_of(100), library=lib),
        lambda x: stem(images),
        lambda x: mixer_of(56, (20, 20, 20), 56, lib)[0](x)[0],
    ]
    outputs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        outputs.append([layer(x) for layer in layers])
    for other in outputs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outputs[0], other, strict=True))


def test_a_not_a_number_stays_one() -> None:
    """A relu made of a comparison must pass it on."""
    x = draw(0, 1, 6, 6, 16)
    x[0, 2, 3, 4] = torch.nan
    lib = library(best_simd())
    assert MapConv(draw(1, 20, 16, 3, 3), None, "relu", lib)(x).isnan().any()
    assert Linear(draw(2, 20, 16), None, "relu", lib)(x).isnan().any()
    w = draw(3, 32, 16), draw(4, 32), draw(5, 16, 32), draw(6, 16)
    assert FeedForward(locals_of(16), *w, lib)(x).isnan().any()
    assert mixer_of(16, (5, 5, 5), 16, lib)[0](x)[0].isnan().any()
