import io
import random
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.evaluation_view import EvaluationView
from pipeline.images import UnreadableImage, decode_with_pillow, decode_with_simplejpeg
from pipeline.ops.torchvision_cpu import allow_torchvision
from pipeline.streaming.config import STRONG, WEAK, AffineConfig, AugmentConfig
from pipeline.streaming.geometry import MAX_SCALED, crop_resize, random_box
from pipeline.streaming.transforms import WIDEST, eval_views, normalise, pair_views, train_views

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TURNED = AugmentConfig(affine=AffineConfig(rotation=30, scale=(0.8, 1.2), shear=15, translation=0.1))


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    """375 x 500, smooth with texture."""
    y, x = np.mgrid[:375, :500]
    waves = [np.sin(x / (9 + 7 * c)) * np.cos(y / (13 - 3 * c)) for c in range(3)]
    noise = np.random.default_rng(0).normal(0, 8, (375, 500, 3))
    return (128 + 90 * np.stack(waves, -1) + noise).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("config", [AugmentConfig(), WEAK, STRONG, TURNED], ids=["plain", "weak", "strong", "turned"])
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


@pytest.mark.parametrize(("crop", "side"), [(0.875, 256), (1.0, 224)])
def test_a_squashed_eval_view_is_the_centre_of_a_square(photo, crop: float, side: int) -> None:
    """As ARM evaluates: Resize((256, 256)), then a centre crop of 224."""
    edge = (side - 224) // 2
    whole = Image.fromarray(photo).resize((side, side), Image.Resampling.BICUBIC)
    want = np.asarray(whole.crop((edge, edge, edge + 224, edge + 224))).astype(float)
    view = eval_views((224, 224), MEAN, STD, view=EvaluationView(resize="squash", crop=crop))
    ours = view.pixels(photo, 0)["images"].permute(1, 2, 0).numpy()
    assert np.abs(ours - want).mean() < 1
    allow_torchvision()
    import timm

    timms = timm.data.create_transform(
        (3, 224, 224), interpolation="bicubic", crop_pct=crop, crop_mode="squash", normalize=False
    )
    assert np.abs(np.asarray(timms(Image.fromarray(photo))).transpose(1, 2, 0) - want).mean() == 0


def test_the_eval_view_is_the_centre(photo):
    picture = Image.fromarray(photo)
    whole = picture.resize((341, 256), Image.Resampling.BICUBIC).crop((58, 16, 282, 240))
    ours = eval_views((224, 224), MEAN, STD).pixels(photo, 0)["images"].permute(1, 2, 0).numpy()
    assert np.abs(ours.astype(int) - np.asarray(whole)).mean() < 1


def whole_view(image: np.ndarray, size: tuple[int, int]) -> torch.Tensor:
    """The evaluation view by its definition: the whole image is resized, then cropped."""
    height, width = image.shape[:2]
    factor = max(size[0] / height, size[1] / width) / 0.875
    scaled = (max(round(height * factor), size[0]), max(round(width * factor), size[1]))
    whole = crop_resize(image, (0, 0, height, width), scaled, "bicubic")
    top, left = round((scaled[0] - size[0]) / 2), round((scaled[1] - size[1]) / 2)
    return whole[:, top : top + size[0], left : left + size[1]]


@settings(deadline=None, max_examples=60)
@given(
    shape=st.tuples(st.integers(1, 120), st.integers(1, 120)),
    size=st.sampled_from([(32, 32), (48, 64), (64, 48)]),
    seed=st.integers(0, 9),
)
def test_an_eval_view_is_the_centre_of_the_whole_resized_image(shape, size, seed):
    """Bit for bit unless the image is far longer than its view; then to a rounding of the size."""
    image = np.random.default_rng(seed).integers(0, 256, (*shape, 3), np.uint8)
    ours, whole = eval_views(size, MEAN, STD).pixels(image, 0)["images"], whole_view(image, size)
    shown = max(size[0] / shape[0], size[1] / shape[1]) / 0.875  # scaled pixels per pixel
    if max(shape[0] * shown / size[0], shape[1] * shown / size[1]) <= WIDEST:
        assert torch.equal(ours, whole)
    smooth = np.broadcast_to(np.linspace(0, 255, max(shape))[:, None, None], (max(shape), min(shape), 3)).astype(
        np.uint8
    )
    smooth = np.ascontiguousarray(smooth if shape[0] > shape[1] else smooth.transpose(1, 0, 2))
    ours, whole = eval_views(size, MEAN, STD).pixels(smooth, 0)["images"], whole_view(smooth, size)
    # A view that is half a scaled pixel off, of a picture that changes by 255 levels over its length.
    assert (ours.float() - whole).abs().max() <= 2 + 255 / max(shape) / 2


@pytest.mark.parametrize("shape", [(1, 1), (1, 20_000), (20_000, 1), (65_000, 1), (3, 60_000), (8_000, 100)])
def test_a_thin_image_costs_a_few_megabytes(shape, monkeypatch):
    """20000 x 1 took 4 GB in an evaluation view."""
    built, original = [], F.interpolate

    def record(image: torch.Tensor, size: tuple[int, int], **options) -> torch.Tensor:
        built.append((size[0] * size[1], image.shape[2] * size[1]))  # pixels: the result's, and between the two passes
        return original(image, size, **options)

    monkeypatch.setattr(F, "interpolate", record)
    image = np.zeros((*shape, 3), np.uint8)
    assert eval_views((224, 224), MEAN, STD).pixels(image, 0)["images"].shape == (3, 224, 224)
    assert built[0][0] <= 1.02 * WIDEST / 0.875**2 * 224**2
    any_box = AugmentConfig(crop_scale=(0.9, 1.0), crop_ratio=(1e-5, 1e5))
    turned = AugmentConfig(affine=AffineConfig(rotation=180, scale=(0.5, 2), shear=30, translation=1))
    for config in (AugmentConfig(), WEAK, STRONG, any_box, turned):
        for seed in range(3):
            view = train_views((224, 224), config, MEAN, STD).pixels(image, seed)["images"]
            assert view.shape == (3, 224, 224)
    assert max(between for _, between in built) <= MAX_SCALED


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
        assert (pixels == decode_with_pillow(data)).all()
    for damaged in (files[0][:5000], b"\xff\xd8\xff", b""):
        with pytest.raises(UnreadableImage, match="not a readable image"):
            decode_with_simplejpeg(damaged)


class Largest(TorchDispatchMode):
    """Notes the most numbers that an operation computes; views and allocations compute none."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.name in ("aten::copy_", "aten::mul_", "aten::add_"):
            self.numbers = max(self.numbers, args[0].numel())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (3, 5, 7), (2, 4, 3, 300, 200), (1, 3, 1, 1), (5, 3, 1, 40_000)])
def test_pieces_that_leave_torch_to_one_thread_are_normalised_as_the_whole(shape: tuple[int, ...]) -> None:
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8)
    constants = torch.rand(3, 1, 1), torch.rand(3, 1, 1)
    with Largest() as largest:
        found = normalise(pixels, constants, torch.empty(shape))
    assert torch.equal(found, torch.empty(shape).copy_(pixels).mul_(constants[0]).add_(constants[1]))
    assert largest.numbers < 2**15  # torch's grain: from there on it may take several threads
