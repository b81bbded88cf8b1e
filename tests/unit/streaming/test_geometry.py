"""Affine views: against torchvision, against a literal map of points, at the edges of the image, and their speed."""

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.ops.torchvision_cpu import allow_torchvision
from pipeline.streaming.config import AffineConfig, AugmentConfig
from pipeline.streaming.geometry import Affine, affine_view, crop_resize, draw_affine, ground_colour
from pipeline.streaming.transforms import train_views

MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
STILL = Affine(0.0, 1.0, (0.0, 0.0), (0.0, 0.0))


def ramps(height: int, width: int) -> np.ndarray:
    """Red grows to the right, green downwards: a view's colour tells which point of the image it shows."""
    y, x = np.mgrid[:height, :width] + 0.5
    return np.stack([255 * x / width, 255 * y / height, 0 * x + 128], -1).round().astype(np.uint8)


@pytest.mark.parametrize(
    "affine",
    [
        Affine(25.0, 1.0, (0.0, 0.0), (0.0, 0.0)),
        Affine(-40.0, 1.3, (12.0, -7.0), (0.125, -0.25)),
        Affine(180.0, 1.0, (0.0, 20.0), (0.0, 0.5)),
    ],
)
def test_an_affine_view_of_the_whole_image_is_torchvisions(affine):
    allow_torchvision()
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import affine as torchvision_affine

    image = np.random.default_rng(0).integers(0, 256, (40, 48, 3), np.uint8)
    fill = (7.0, 8.0, 9.0)

    def theirs(pixels: torch.Tensor) -> torch.Tensor:
        return torchvision_affine(
            pixels,
            angle=affine.rotation,
            translate=[round(affine.translation[0] * 48), round(affine.translation[1] * 40)],
            scale=affine.scale,
            shear=list(affine.shear),
            interpolation=InterpolationMode.BILINEAR,
        )

    share = theirs(torch.ones(1, 40, 48))  # how much of a view's pixel lies in the image
    colour = torch.tensor(fill)[:, None, None]
    expected = theirs(torch.from_numpy(image).permute(2, 0, 1).float()) + (1 - share) * colour
    ours = affine_view(image, (0, 0, 40, 48), (40, 48), affine, "bilinear", (7, 8, 9))
    assert (ours - expected.clamp(0, 255)).abs().max() < 0.51


def test_without_a_map_it_is_the_resized_crop():
    image, box = ramps(90, 120), (10, 20, 64, 80)
    ours = affine_view(image, box, (32, 40), STILL, "bilinear", (0, 0, 0)).int()
    assert (ours - crop_resize(image, box, (32, 40), "bilinear").int()).abs().max() <= 1


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    shape=st.tuples(st.integers(30, 150), st.integers(30, 150)),
    size=st.sampled_from([(32, 32), (24, 40)]),
    interpolation=st.sampled_from(["bilinear", "bicubic"]),
)
def test_every_pixel_shows_the_point_that_the_map_says(seed, shape, size, interpolation):
    """Against the map of each pixel's centre in float64; inside the image the ramps tell the point to a few levels."""
    rng = random.Random(seed)
    affine = draw_affine(rng, AffineConfig(rotation=90, scale=(0.7, 1.5), shear=20, translation=0.3))
    box = (rng.randint(0, 5), rng.randint(0, 5), shape[0] - 5, shape[1] - 5)
    ours = affine_view(ramps(*shape), box, size, affine, interpolation, (1, 2, 255)).double()
    # How far the interpolation reads.
    reach = 3 * max(1.0, box[2] / size[0] / affine.scale, box[3] / size[1] / affine.scale)
    for row in range(0, size[0], 5):
        for column in range(0, size[1], 5):
            # forward: shear, scale, rotate about the centre, translate; so backwards from the pixel to the crop
            x = column + 0.5 - size[1] / 2 - affine.translation[0] * size[1]
            y = row + 0.5 - size[0] / 2 - affine.translation[1] * size[0]
            turn = math.radians(affine.rotation)
            x, y = math.cos(turn) * x + math.sin(turn) * y, -math.sin(turn) * x + math.cos(turn) * y
            x, y = x / affine.scale, y / affine.scale
            y = y + math.tan(math.radians(affine.shear[1])) * x
            x = x + math.tan(math.radians(affine.shear[0])) * y
            x = box[1] + (x + size[1] / 2) * box[3] / size[1]
            y = box[0] + (y + size[0] / 2) * box[2] / size[0]
            red, green, blue = ours[:, row, column].tolist()
            if reach < x < shape[1] - reach and reach < y < shape[0] - reach:
                assert abs(red - 255 * x / shape[1]) < 6
                assert abs(green - 255 * y / shape[0]) < 6
            elif not (-reach < x < shape[1] + reach and -reach < y < shape[0] + reach):
                assert (red, green, blue) == (1, 2, 255)


def test_a_turned_crop_reads_the_image_beyond_its_edges():
    """The ground appears only where the image ends: a small crop at the centre has none at any angle."""
    image = np.full((100, 100, 3), 200, np.uint8)
    inside = affine_view(image, (40, 40, 20, 20), (32, 32), Affine(45.0, 1.0, (0, 0), (0.1, 0)), "bicubic", (0, 0, 0))
    whole = affine_view(image, (0, 0, 100, 100), (32, 32), Affine(45.0, 1.0, (0, 0), (0.0, 0)), "bicubic", (0, 0, 0))
    assert inside.unique().tolist() == [200]
    large = np.full((600, 600, 3), 200, np.uint8)  # shrunk by six
    shrunk = affine_view(
        large, (200, 200, 200, 200), (32, 32), Affine(45.0, 1.0, (0, 0), (0.1, 0)), "bicubic", (0,) * 3
    )
    assert shrunk.unique().tolist() == [200]
    assert whole[:, 0, 0].tolist() == [0, 0, 0]


def test_the_ground_is_the_commonest_colour_of_the_border():
    page = np.full((28, 30, 3), (250, 240, 230), np.uint8)
    page[10:20, 5:25] = 0  # the writing
    page[0, 3:9] = 0  # touches the border
    assert ground_colour(page) == (250, 240, 230)
    assert ground_colour(np.full((1, 1, 3), 9, np.uint8)) == (9, 9, 9)
    turned = affine_view(
        page, (0, 0, 28, 30), (28, 30), Affine(45.0, 1.0, (0, 0), (0, 0)), "bicubic", ground_colour(page)
    )
    assert turned[:, 0, 0].tolist() == [250, 240, 230]


def test_shrinking_is_antialiased():
    """A checkerboard of single pixels becomes grey, as it does in a resized crop; interpolating at points would alias."""
    board = np.broadcast_to((np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8)[..., None], (256, 256, 3)).copy()
    view = affine_view(board, (0, 0, 256, 256), (32, 32), Affine(10.0, 1.0, (0, 0), (0, 0)), "bilinear", (128,) * 3)
    assert (view.int() - 128).abs().max() <= 2


def test_the_map_is_drawn_within_its_bounds_and_fills_them():
    config = AffineConfig(rotation=20, scale=(0.5, 2.0), shear=10, translation=0.25)
    drawn = [draw_affine(random.Random(seed), config) for seed in range(500)]
    for values, least, most in (
        ([a.rotation for a in drawn], -20, 20),
        ([a.scale for a in drawn], 0.5, 2.0),
        ([a.shear[1] for a in drawn], -10, 10),
        ([a.translation[0] for a in drawn], -0.25, 0.25),
    ):
        assert least <= min(values) < least + 0.1 * (most - least)
        assert most - 0.1 * (most - least) < max(values) <= most
    assert sum(a.scale > 1 for a in drawn) == pytest.approx(250, abs=40)  # uniform in the logarithm


def test_a_chance_of_zero_is_the_view_without_a_map_but_for_the_draw():
    image = np.random.default_rng(1).integers(0, 256, (40, 40, 3), np.uint8)
    never = AugmentConfig(affine=AffineConfig(rotation=90, chance=0.0), crop_scale=(1, 1), horizontal_flip=0.0)
    plain = AugmentConfig(crop_scale=(1, 1), horizontal_flip=0.0)
    for seed in range(5):
        assert torch.equal(
            train_views((32, 32), never, MEAN, STD).pixels(image, seed)["images"],
            train_views((32, 32), plain, MEAN, STD).pixels(image, seed)["images"],
        )


@pytest.mark.parametrize("scale", [(1.2, 0.8), (0.0, 1.0), (1.0, 11.0)])
def test_a_scale_out_of_bounds_is_refused(scale):
    with pytest.raises(ValidationError, match="smallest <= largest"):
        AffineConfig(scale=scale)
