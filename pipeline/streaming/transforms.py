"""Views: what a model sees of a decoded image, for training, for evaluation, and as weak/strong pairs.

Pixels stay uint8 until the batch is whole: workers hand over a quarter of the bytes, and a batch is normalised once.
All randomness comes from the seed of the call. Shapes: H, W height and width of the view in pixels.
"""

import functools
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor

from pipeline import seeds
from pipeline.decoding import DEFAULT, Decoding
from pipeline.evaluation_view import USUAL, EvaluationView
from pipeline.images import Pixels, decode, to_pixels
from pipeline.ops.affine import compiled
from pipeline.streaming.config import AugmentConfig
from pipeline.streaming.geometry import affine_view, crop_resize, draw_affine, ground_colour, random_box

Picture = bytes | Image.Image | Pixels

ONE_THREAD = 32_767  # numbers up to which torch does not divide an operation among threads
WIDEST = 8  # evaluation resizes at most this many times what its view shows, along each side


class View:
    """Makes one view of an image.

    Args:
        image_size: H, W.
        mean: Mean per channel of pixels in [0, 1].
        std: Standard deviation per channel of pixels in [0, 1].
        pixels: Makes the (3, H, W) uint8 view from the decoded image and a seed.
        decoding: How encoded images are decoded.
    """

    names: tuple[str, ...] = ("images",)

    def __init__(
        self,
        image_size: tuple[int, int],
        mean: Sequence[float],
        std: Sequence[float],
        pixels: Callable[[Pixels, int], Tensor],
        decoding: Decoding = DEFAULT,
    ) -> None:
        self.image_size, self.decoding = image_size, decoding
        self.mean, self.std = tuple(mean), tuple(std)
        self._pixels = pixels

    def pixels(self, image: Pixels, seed: int) -> dict[str, Tensor]:
        """Return a (3, H, W) uint8 view under each of `names`."""
        return {"images": self._pixels(image, seed)}

    def normalise(self, images: Tensor, out: Tensor | None = None) -> Tensor:
        """Convert (..., 3, H, W) uint8 to float32 normalised by the view's mean and std, into `out` if given."""
        return normalise(images, self.constants(), torch.empty(images.shape) if out is None else out)

    def constants(self) -> tuple[Tensor, Tensor]:
        """Return scale and shift, both (3, 1, 1): pixels x scale + shift are normalised."""
        scale = torch.tensor([1 / (255 * std) for std in self.std])[:, None, None]
        shift = torch.tensor([-m / s for m, s in zip(self.mean, self.std, strict=True)])[:, None, None]
        return scale, shift

    def __call__(self, picture: Picture, seed: int) -> dict[str, Tensor]:
        """Return the normalised views of one picture.

        Raises:
            DataError: The bytes are no image.
        """
        return {
            name: self.normalise(view) for name, view in self.pixels(as_pixels(picture, self.decoding), seed).items()
        }


def normalise(images: Tensor, constants: Sequence[Tensor], out: Tensor) -> Tensor:
    """Normalise (..., 3, H, W) uint8 pixels into `out`, on any device, by a view's `constants` on that device.

    On a CPU it works on pieces that torch leaves to one thread. Data workers keep the cores busy, and several threads
    of torch would wait for one another.
    """
    if out.device.type != "cpu":
        return _normalised(images, constants, out)
    area = images.shape[-2] * images.shape[-1]
    rows, sources = max(1, ONE_THREAD // area), images.reshape(-1, area)
    whole = [constant.view(-1, 1).repeat(len(sources) // 3, 1) for constant in constants]
    groups = zip(*(tensor.split(rows) for tensor in (sources, out.view(-1, area), *whole)), strict=True)
    for source, target, *own in groups:
        for piece, into in zip(source.split(ONE_THREAD, 1), target.split(ONE_THREAD, 1), strict=True):
            _normalised(piece, own, into)
    return out


def _normalised(images: Tensor, constants: Sequence[Tensor], out: Tensor) -> Tensor:
    scale, shift = constants
    return out.copy_(images).mul_(scale).add_(shift)


class PairView(View):
    """Makes a weak and a strong view of one decoded image, each with its own crop."""

    names = ("images", "strong")

    def __init__(self, weak: View, strong: View) -> None:
        super().__init__(weak.image_size, weak.mean, weak.std, weak._pixels, weak.decoding)
        self._strong = strong

    def pixels(self, image: Pixels, seed: int) -> dict[str, Tensor]:
        """Return both (3, H, W) uint8 views."""
        return {"images": self._pixels(image, seed), "strong": self._strong._pixels(image, seeds.fold(seed, 1))}


def as_pixels(picture: Picture, decoding: Decoding = DEFAULT) -> Pixels:
    """Return (height, width, 3) uint8 pixels of encoded bytes or of a Pillow image; pixels are returned as they are."""
    if isinstance(picture, bytes):
        return decode(picture, decoding)
    return to_pixels(picture, decoding) if isinstance(picture, Image.Image) else picture


def train_views(
    image_size: tuple[int, int],
    config: AugmentConfig,
    mean: Sequence[float],
    std: Sequence[float],
    decoding: Decoding = DEFAULT,
) -> View:
    """Return the training view: a random crop, resampled under a random affine map, then the augmentation of `config`.

    Args:
        image_size: H, W.
        config: The augmentation.
        mean: Mean per channel of pixels in [0, 1].
        std: Standard deviation per channel of pixels in [0, 1].
        decoding: How encoded images are decoded.
    """
    if config.affine:
        compiled()  # here, not in each data worker
    augment = _rand_augment(config.rand_augment, image_size, tuple(mean), config.interpolation)
    mean_colour = tuple(min(255, max(0, round(255 * m))) for m in mean)

    def pixels(image: Pixels, seed: int) -> Tensor:
        rng = random.Random(seed)
        box = random_box(rng, image.shape[0], image.shape[1], config.crop_scale, config.crop_ratio)
        if config.affine and rng.random() < config.affine.chance:
            ground = ground_colour(image) if config.affine.fill == "border" else mean_colour
            view = affine_view(image, box, image_size, draw_affine(rng, config.affine), config.interpolation, ground)
        else:
            view = crop_resize(image, box, image_size, config.interpolation)
        if rng.random() < config.horizontal_flip:
            view = view.flip(-1)
        if augment or config.color_jitter:
            picture = Image.fromarray(view.permute(1, 2, 0).contiguous().numpy())
            if config.color_jitter:
                picture = _color_jitter(picture, rng, config.color_jitter)
            if augment:
                picture = _apply(augment, picture, rng)
            view = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        if rng.random() < config.erase:
            view = _erase(
                view,
                rng,
                np.asarray(mean_colour, np.float64),
                np.asarray(std) * 255 if config.erase_fill == "noise" else None,
            )
        return view

    return View(image_size, mean, std, pixels, decoding)


def eval_views(
    image_size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    *,
    view: EvaluationView = USUAL,
    decoding: Decoding = DEFAULT,
) -> View:
    """Return the evaluation view: the image is resized, then its centre is cropped; nothing is random.

    Limit: the resized image has at most WIDEST / view.crop times the view's pixels. Of an image that is longer, only
    the middle is resized, which holds all that the view shows and more than the interpolation reads about it.

    Args:
        image_size: H, W.
        mean: Mean per channel of pixels in [0, 1].
        std: Standard deviation per channel of pixels in [0, 1].
        view: How the image is resized before the crop.
        decoding: How encoded images are decoded.
    """

    def pixels(image: Pixels, seed: int) -> Tensor:
        if view.resize == "squash":
            size = (round(image_size[0] / view.crop), round(image_size[1] / view.crop))
        else:
            image = _middle(image, image_size, view.crop)
            factor = max(image_size[0] / image.shape[0], image_size[1] / image.shape[1]) / view.crop
            size = (
                max(round(image.shape[0] * factor), image_size[0]),
                max(round(image.shape[1] * factor), image_size[1]),
            )
        whole = crop_resize(image, (0, 0, *image.shape[:2]), size, view.interpolation)
        top, left = round((size[0] - image_size[0]) / 2), round((size[1] - image_size[1]) / 2)
        return whole[:, top : top + image_size[0], left : left + image_size[1]]

    return View(image_size, mean, std, pixels, decoding)


def _middle(image: Pixels, image_size: tuple[int, int], crop: float) -> Pixels:
    """Cut equally from both ends of an image that is longer than WIDEST times what the evaluation view shows of it."""
    factor = max(image_size[0] / image.shape[0], image_size[1] / image.shape[1]) / crop
    cuts = (
        max(0, n - math.ceil(WIDEST * side / factor)) // 2 for n, side in zip(image.shape, image_size, strict=False)
    )
    top, left = cuts
    return image[top : image.shape[0] - top, left : image.shape[1] - left]


def pair_views(weak: View, strong: View) -> PairView:
    """Return both views of one decoded image: `images` is the weak one, `strong` the strong one."""
    return PairView(weak, strong)


def _color_jitter(picture: Image.Image, rng: random.Random, strength: float) -> Image.Image:
    """Change brightness, contrast and saturation, in random order."""
    for enhance in rng.sample([ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color], 3):
        picture = enhance(picture).enhance(rng.uniform(max(0.0, 1 - strength), 1 + strength))
    return picture


def _erase(view: Tensor, rng: random.Random, fill: np.ndarray, noise: np.ndarray | None) -> Tensor:
    """Erase one rectangle of 2 % to a third of the area, with the mean colour or with noise about it.

    The noise has the standard deviation of the data. Deviation: timm erases after normalisation; here the noise is
    rounded to pixel values and clipped at 0 and 255.
    """
    height, width = view.shape[1:]
    for _ in range(10):
        area = height * width * rng.uniform(0.02, 1 / 3)
        aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < h < height and 0 < w < width:
            top, left = rng.randint(0, height - h), rng.randint(0, width - w)
            patch = np.broadcast_to(fill[:, None, None], (3, h, w))
            if noise is not None:
                draws = np.random.Generator(np.random.PCG64(rng.getrandbits(64))).standard_normal((3, h, w))
                patch = patch + draws * noise[:, None, None]
            view = view.clone()
            view[:, top : top + h, left : left + w] = torch.from_numpy(patch.round().clip(0, 255).astype(np.uint8))
            return view
    return view


@functools.cache
def _rand_augment(notation: str, image_size: tuple[int, int], mean: tuple[float, ...], interpolation: str) -> Any:
    """Return RandAugment as timm has it, or None for an empty notation."""
    if not notation:
        return None
    from pipeline.ops.torchvision_cpu import allow_torchvision

    allow_torchvision()
    from timm.data.auto_augment import rand_augment_transform

    settings = {
        "translate_const": int(min(image_size) * 0.45),
        "img_mean": tuple(min(255, round(255 * m)) for m in mean),
        "interpolation": Image.Resampling.BICUBIC if interpolation == "bicubic" else Image.Resampling.BILINEAR,
    }
    return rand_augment_transform(notation, settings)


def _apply(augment: Any, picture: Image.Image, rng: random.Random) -> Image.Image:
    """Do what timm's RandAugment does, drawing from `rng` alone.

    Its own call draws from the global generators of numpy and random. So the operations are chosen here, and the global
    state that they draw from is seeded before and restored after.
    """
    chance = augment.choice_weights
    draw = np.random.Generator(np.random.PCG64(rng.getrandbits(64)))
    chosen = draw.choice(len(augment.ops), augment.num_layers, replace=chance is None, p=chance)
    state = random.getstate()
    random.seed(rng.getrandbits(64))
    try:
        for k in chosen:
            picture = augment.ops[k](picture)
    finally:
        random.setstate(state)
    return picture
