"""Calls of many layers of EfficientViM equal the layers one by one, or float64, for every instruction set of this machine."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pipeline.ops.native.stages import Downsample, Pool, Stage
from pipeline.ops.native.stem import MapConv, Stem
from pipeline.ops.native.vision import Depthwise, FeedForward, Linear, Widen
from pipeline.ops.native.vision_library import VisionLibrary
from tests.unit.ops.test_vision import (
    SETS,
    assert_near,
    convolved,
    draw,
    few,
    library,
    locals_of,
    mixer_of,
    rows,
    sizes,
)


def feed_forward(channels: int, hidden: int, lib: VisionLibrary, seed: int) -> FeedForward:
    up, down = draw(seed + 11, hidden, channels) / channels**0.5, draw(seed + 12, channels, hidden) / hidden**0.5
    return FeedForward(locals_of(channels), up, draw(seed + 13, hidden), down, draw(seed + 14, channels), lib)


def stage_of(channels: int, states: int, depth: int, lib: VisionLibrary) -> Stage:
    groups = states, states, states
    blocks = [
        (mixer_of(channels, groups, 20, lib, 20 * k)[0], feed_forward(channels, 50, lib, 20 * k)) for k in range(depth)
    ]
    return Stage(blocks, lib)


@few
@given(
    shape=st.tuples(st.integers(1, 7), st.integers(1, 9), st.integers(1, 9), st.integers(1, 70)),
    states=st.integers(1, 40),
    depth=st.integers(1, 3),
    threads=st.integers(1, 4),
)
@pytest.mark.parametrize("simd", SETS)
def test_a_stage_equals_its_layers_to_the_bit(
    simd: str, shape: tuple[int, int, int, int], states: int, depth: int, threads: int
) -> None:
    stage, x = stage_of(shape[-1], states, depth, library(simd)), draw(0, *shape)
    torch.set_num_threads(threads)
    y, hidden = stage(x)
    torch.set_num_threads(1)
    want, h = x, x
    for mixer, ffn in zip(stage.mixers, stage.ffns, strict=True):
        want, h = mixer(want)
        want = ffn(want)
    assert torch.equal(y, want)
    assert torch.equal(hidden[..., : shape[-1]], h)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("simd", SETS)
def test_groups_of_images_change_no_bit(simd: str, threads: int) -> None:
    """With AVX-512 a group has at most 35 images of 25 pixels and 16 states; one of 81 images is left for two threads."""
    stage, x = stage_of(24, 16, 2, library(simd)), draw(0, 81, 5, 5, 24)
    torch.set_num_threads(threads)
    y, hidden = stage(x)
    torch.set_num_threads(1)
    alone = [stage(image[None]) for image in x]
    assert torch.equal(y, torch.cat([one for one, _ in alone]))
    assert torch.equal(hidden[..., :24], torch.cat([h for _, h in alone])[..., :24])


def test_a_copy_of_a_stage_has_its_own_weights() -> None:
    stage, x = stage_of(8, 4, 2, library(SETS[0])), draw(0, 1, 3, 3, 8)
    want = stage(x)[0]
    other = copy.deepcopy(stage)
    for weight in stage.buffers():
        weight.zero_()
    assert torch.equal(other(x)[0], want)


@few
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 9), sizes),
    wide=sizes,
    squeezed=sizes,
    outputs=sizes,
    threads=st.integers(1, 3),
)
@pytest.mark.parametrize("simd", SETS)
def test_a_downsampler(
    simd: str, shape: tuple[int, int, int, int], wide: int, squeezed: int, outputs: int, threads: int
) -> None:
    lib, channels, x = library(simd), shape[-1], draw(0, *shape)
    linear = {
        "widen": (draw(1, wide, channels) / channels**0.5, draw(2, wide)),
        "squeeze": (draw(3, squeezed, wide) / wide**0.5, draw(4, squeezed)),
        "excite": (draw(5, wide, squeezed) / squeezed**0.5, draw(6, wide)),
        "narrow": (draw(7, outputs, wide) / wide**0.5, draw(8, outputs)),
    }
    first, last, (taps, taps_bias) = locals_of(channels), locals_of(outputs), locals_of(wide)
    torch.set_num_threads(threads)
    layer = Downsample(
        Depthwise(first, lib),
        Widen(*linear["widen"], taps, taps_bias, lib),
        Linear(*linear["squeeze"], "relu", lib),
        Linear(*linear["excite"], "sigmoid", lib),
        Linear(*linear["narrow"], "none", lib),
        Depthwise(last, lib),
        lib,
    )
    double = {name: (w.double(), b.double()) for name, (w, b) in linear.items()}
    m = F.relu(F.linear(convolved(x, first), *double["widen"])).permute(0, 3, 1, 2)
    m = rows(F.relu(F.conv2d(m, taps.double(), taps_bias.double(), 2, 1, groups=wide)))
    factors = torch.sigmoid(F.linear(F.relu(F.linear(m.mean((1, 2)), *double["squeeze"])), *double["excite"]))
    want = convolved(F.linear(m * factors[:, None, None], *double["narrow"]), last)
    found = layer(x)
    assert_near(found, want, 1e-5)
    torch.set_num_threads(1)
    assert torch.equal(layer(x), found)


@few
@given(
    batch=st.integers(1, 5),
    count=sizes,
    width=st.integers(2, 70),
    more=st.integers(0, 9),
    eps=st.sampled_from([None, 1e-6, 1e-2]),
)
@pytest.mark.parametrize("simd", SETS)
def test_pooling(simd: str, batch: int, count: int, width: int, more: int, eps: float | None) -> None:
    """The rows may have more columns, images more rows, and the result lies between other columns, which stay as they are."""
    whole, scale = draw(0, batch, count + 2, width + more), draw(1, width)
    to = torch.full((batch, width + 5), 7.0)
    Pool(scale, eps, library(simd))(whole[:, :count], to[:, 2 : 2 + width])
    scaled = whole[:, :count, :width].double() * scale.double()
    want = (scaled if eps is None else F.layer_norm(scaled, (width,), None, None, eps)).mean(1)
    assert_near(to[:, 2 : 2 + width], want, 5e-6)
    assert (to[:, :2] == 7).all()
    assert (to[:, 2 + width :] == 7).all()


def conv(seed: int, outputs: int, inputs: int) -> tuple[Tensor, Tensor, str]:
    return draw(seed, outputs, inputs, 3, 3) / (3 * inputs**0.5), draw(seed + 1, outputs), "relu"


@few
@given(
    batch=st.integers(1, 5),
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    count=st.integers(0, 2),
    threads=st.integers(1, 3),
)
@pytest.mark.parametrize("simd", SETS)
def test_a_long_stem_equals_its_parts_to_the_bit(
    simd: str, batch: int, height: int, width: int, count: int, threads: int
) -> None:
    lib, images = library(simd), draw(0, batch, 3, height, width)
    more = [conv(3, 28, 32), conv(5, 9, 28)][:count]
    short = Stem(conv(1, 16, 3), conv(9, 32, 16), library=lib)
    torch.set_num_threads(threads)
    found = Stem(conv(1, 16, 3), conv(9, 32, 16), *more, library=lib)(images)
    torch.set_num_threads(1)
    want = short(images)
    for layer in more:
        want = MapConv(*layer, lib)(want)
    assert torch.equal(found, want)
