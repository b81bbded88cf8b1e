import io
import random
import time

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.images import UnreadableImage, decode_with_pillow, decode_with_simplejpeg
from pipeline.streaming.config import STRONG, WEAK, AugmentConfig
from pipeline.streaming.transforms import crop_resize, eval_views, pair_views, random_box, train_views

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    """375 x 500, smooth with texture."""
    y, x = np.mgrid[:375, :500]
    waves = [np.sin(x / (9 + 7 * c)) * np.cos(y / (13 - 3 * c)) for c in range(3)]
    noise = np.random.default_rng(0).normal(0, 8, (375, 500, 3))
    return (128 + 90 * np.stack(waves, -1) + noise).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("config", [AugmentConfig(), WEAK, STRONG], ids=["plain", "weak", "strong"])
def test_a_view_is_a_function_of_its_seed_alone(photo, config):
    views = train_views((64, 64), config, MEAN, STD)
    state, numpy_state = random.getstate(), np.random.get_state()[1].copy()
    first = views(photo, 5)["images"]
    assert first.shape == (3, 64, 64)
    assert random.getstate() == state
    assert (np.random.get_state()[1] == numpy_state).all()
    random.random()
    assert torch.equal(views(photo, 5)["images"], first)
    assert not torch.equal(views(photo, 6)["images"], first)


def test_pair_views_are_the_views_of_the_same_picture(photo):
    weak, strong = train_views((48, 64), WEAK, MEAN, STD), train_views((48, 64), STRONG, MEAN, STD)
    both = pair_views(weak, strong)(photo, 9)
    assert torch.equal(both["images"], weak(photo, 9)["images"])
    assert both["strong"].shape == (3, 48, 64)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_resized_crops_are_pillows_within_two_levels_in_the_mean(photo, interpolation):
    mode = Image.Resampling[interpolation.upper()]
    for box in ((10, 20, 300, 400), (0, 0, 375, 500), (100, 100, 50, 40)):
        top, left, height, width = box
        ours = crop_resize(photo, box, (224, 224), interpolation).permute(1, 2, 0).numpy()
        crop = Image.fromarray(photo[top : top + height, left : left + width])
        pillow = np.asarray(crop.resize((224, 224), mode))
        assert np.abs(ours.astype(int) - pillow).mean() < 0.5


def test_normalise_is_the_formula(photo):
    views = eval_views((224, 224), MEAN, STD)
    pixels = views.pixels(photo, 0)["images"]
    expected = (pixels / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    assert torch.allclose(views.normalise(pixels), expected, atol=1e-5)


def test_the_eval_view_is_the_centre(photo):
    picture = Image.fromarray(photo)
    whole = picture.resize((341, 256), Image.Resampling.BICUBIC).crop((58, 16, 282, 240))
    ours = eval_views((224, 224), MEAN, STD).pixels(photo, 0)["images"].permute(1, 2, 0).numpy()
    assert np.abs(ours.astype(int) - np.asarray(whole)).mean() < 1


def test_random_boxes_fit_and_fill_the_scale():
    rng = random.Random(0)
    boxes = [random_box(rng, 375, 500, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(2000)]
    assert all(t >= 0 and x >= 0 and t + h <= 375 and x + w <= 500 for t, x, h, w in boxes)
    areas = np.array([h * w for _, _, h, w in boxes]) / (375 * 500)
    assert areas.min() > 0.07
    assert 0.4 < areas.mean() < 0.56
    assert random_box(rng, 2, 1000, (0.9, 1.0), (3 / 4, 4 / 3)) == (0, 498, 2, 3)


def test_a_batch_of_digits_is_fast():
    views = train_views((32, 32), AugmentConfig(crop_scale=(0.6, 1.0)), MEAN, STD)
    digit = np.zeros((8, 8, 3), np.uint8)
    views.pixels(digit, 0)

    def batch() -> float:
        start = time.perf_counter()
        for seed in range(64):
            views.pixels(digit, seed)
        return time.perf_counter() - start

    assert min(batch() for _ in range(5)) < 0.06


def test_every_decoder_gives_pillows_pixels(photo):
    def encode(image: Image.Image, kind: str, **options) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        return buffer.getvalue()

    picture = Image.fromarray(photo)
    files = [
        *(encode(picture, "JPEG", quality=q, subsampling=s) for q in (50, 95) for s in (0, 1, 2)),
        encode(picture, "JPEG", progressive=True),
        encode(picture.convert("L"), "JPEG"),
        encode(picture.convert("CMYK"), "JPEG"),
        encode(picture.convert("P"), "PNG", transparency=bytes(range(200))),
        encode(picture.convert("RGBA"), "WEBP", lossless=True),
    ]
    for data in files:
        pixels = decode_with_simplejpeg(data)
        assert pixels.shape == (375, 500, 3)
        assert np.abs(pixels.astype(int) - decode_with_pillow(data)).mean() <= 2
    for damaged in (files[0][:5000], b"\xff\xd8\xff", b""):
        with pytest.raises(UnreadableImage, match="not a readable image"):
            decode_with_simplejpeg(damaged)
