"""Views under affine maps: the compiled kernel and torch, each against torch's grid_sample in float64 before it is rounded."""

import math
import random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.ops.affine import Map, _by_torch, affine_sample, compiled


def exactly(pixels: Tensor, m: Map, size: tuple[int, int], interpolation: str, ground: tuple[int, ...]) -> Tensor:
    _, rows, columns = pixels.shape
    y, x = (torch.arange(n, dtype=torch.float64) + 0.5 for n in size)
    at_x = m.x + m.xx * x[None, :] + m.xy * y[:, None]
    at_y = m.y + m.yx * x[None, :] + m.yy * y[:, None]
    grid = torch.stack([2 * at_x / columns - 1, 2 * at_y / rows - 1], -1)[None]
    colour = torch.tensor(ground, dtype=torch.float64)[:, None, None]
    return (F.grid_sample((pixels - colour)[None], grid, interpolation, align_corners=False)[0] + colour).clamp(0, 255)


@pytest.fixture(params=["compiled", "torch"])
def sample(request: pytest.FixtureRequest):
    if request.param == "torch":
        return _by_torch
    if compiled() is None:
        pytest.skip("no C++ compiler")
    return affine_sample


@settings(deadline=None, max_examples=150)
@given(
    seed=st.integers(0, 10**6),
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    size=st.tuples(st.integers(1, 33), st.integers(1, 33)),
    interpolation=st.sampled_from(["bilinear", "bicubic"]),
    channels_last=st.booleans(),
)
def test_each_value_is_the_nearest_level(seed, shape, size, interpolation, channels_last):
    generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)
    kind = (*shape, 3) if channels_last else (3, *shape)
    pixels = torch.randint(256, kind, generator=generator, dtype=torch.uint8)
    pixels = pixels.permute(2, 0, 1) if channels_last else pixels
    of_view = Map(*(rng.uniform(-9, 9) for _ in range(2)), *(rng.uniform(-2, 2) for _ in range(4)))
    ground = tuple(rng.randrange(256) for _ in range(3))
    expected = exactly(pixels, of_view, size, interpolation, ground)
    for by in (affine_sample, _by_torch):
        assert (by(pixels, of_view, size, interpolation, ground) - expected).abs().max() < 0.505


def test_a_crop_of_an_image_is_read_where_it_lies(sample):
    image = torch.randint(256, (20, 30, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    crop = image[3:11, 5:17].permute(2, 0, 1)
    still = Map(0.0, 0.0, 1.0, 0.0, 0.0, 1.0)
    for interpolation in ("bilinear", "bicubic"):
        assert torch.equal(sample(crop, still, (8, 12), interpolation, (0, 0, 0)), crop)


@pytest.mark.parametrize("far", [1e6, 1e18, 1e300, -1e300, math.inf, math.nan])
def test_what_is_far_from_the_image_is_ground(far):
    pixels = torch.full((3, 5, 5), 200, dtype=torch.uint8)
    for interpolation in ("bilinear", "bicubic"):
        view = affine_sample(pixels, Map(far, 0.0, 1.0, 0.0, 0.0, 1.0), (4, 4), interpolation, (1, 2, 3))
        assert view.flatten(1).unique(dim=1).flatten().tolist() == [1, 2, 3] or compiled() is None
