"""An exported classifier that names what images show.

    classifier = pipeline.load("runs/demo/semi/export")
    for prediction in classifier.predict("photos/"):
        print(prediction)

Images are prepared as in an evaluation, and probabilities are calibrated by a temperature: the card of the export says how.
"""

import glob
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.datasets.convert.scan import find_images
from pipeline.datasets.convert.source import LeftOut
from pipeline.datasets.formats import IMAGE_EXTENSIONS
from pipeline.datasets.text import shown
from pipeline.decoding import Decoding
from pipeline.errors import ConfigError, DataError
from pipeline.exports.card import Card

if TYPE_CHECKING:
    import torch
    from torch import nn

BATCH = 32
MAX_BYTES = 512 * 2**20  # a larger file is no photograph
PICTURE_PIXELS = 224  # side of a Grad-CAM picture

ImageLike = str | Path | bytes | Image.Image | NDArray[np.uint8]
OnError = Callable[[str, DataError], None]


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The most probable classes of one image, best first.

    Attributes:
        source: Path of the image file, or "image N" for the Nth image of a call (from 0).
        names: Class names.
        probabilities: Their probabilities, in [0, 1].
        picture: With `explain`, the image under its Grad-CAM map: where the evidence for the best class lies.
    """

    source: str
    names: tuple[str, ...]
    probabilities: tuple[float, ...]
    picture: Image.Image | None = field(default=None, repr=False, compare=False)

    @property
    def name(self) -> str:
        """The most probable class."""
        return self.names[0]

    @property
    def probability(self) -> float:
        """The probability of the most probable class, in [0, 1]."""
        return self.probabilities[0]

    @property
    def summary(self) -> str:
        """All names with their probabilities in percent, on one line."""
        return "  ".join(f"{name} {100 * p:.1f}%" for name, p in zip(self.names, self.probabilities, strict=True))

    def __str__(self) -> str:
        return f"{self.source}  {self.summary}"


class Classifier:
    """The model of an export with its classes and its preprocessing. `load` makes one.

    Args:
        model: The network, in eval mode. Predictions are computed on its device, so `model.to("cuda")` moves them.
        card: The card of the export.
        decoding: How images are decoded; None = as the card says.
    """

    def __init__(self, model: "nn.Module", card: Card, decoding: Decoding | None = None) -> None:
        from pipeline.streaming.transforms import eval_views

        self.model, self.card = model, card
        self._view = eval_views(
            card.model.image_size,
            mean=card.preprocessing.mean,
            std=card.preprocessing.std,
            view=card.preprocessing.view,
            decoding=decoding or card.preprocessing.decoding,
        )

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names, in the order of the logits."""
        return self.card.classes

    def predict(
        self,
        images: ImageLike | Iterable[ImageLike],
        *,
        top: int = 5,
        explain: bool = False,
        on_error: OnError | None = None,
        batch: int = BATCH,
    ) -> list[Prediction]:
        """Name what images show.

        Args:
            images: One image or several: the path of a file, or of a folder with images at any depth; a pattern such as
                "photos/**/*.jpg"; the bytes of a file; a PIL image; an array (H, W, 3) or (H, W) of uint8.
            top: The number of classes to return for each image.
            explain: Whether to draw a Grad-CAM picture of each image.
            on_error: Called with the source and the error of an image that cannot be read, which is then left out;
                None = the error is raised.
            batch: The number of images that the model sees at once. It changes the memory and the speed only.

        Returns:
            One prediction for each image, in order. Images of a folder or a pattern are sorted by path.

        Raises:
            ConfigError: If `top` or `batch` is below 1.
            DataError: If an image cannot be read, a folder holds none, or a pattern matches none.
        """
        return list(self.stream(images, top=top, explain=explain, on_error=on_error, batch=batch))

    def stream(
        self,
        images: ImageLike | Iterable[ImageLike],
        *,
        top: int = 5,
        explain: bool = False,
        on_error: OnError | None = None,
        batch: int = BATCH,
    ) -> Iterator[Prediction]:
        """Yield what `predict` returns, batch by batch, so that the images need not fit into memory."""
        if top < 1:
            raise ConfigError(f"top = {top}: ask for at least one class")
        if batch < 1:
            raise ConfigError(f"batch = {batch}: give at least one image")
        readable = self._readable(images, on_error)
        while together := list(itertools.islice(readable, batch)):
            yield from self._predict([source for source, _ in together], [view for _, view in together], top, explain)

    def _readable(
        self, images: ImageLike | Iterable[ImageLike], on_error: OnError | None
    ) -> Iterator[tuple[str, "torch.Tensor"]]:
        """Yield the source and the view (3, H, W) of every image that can be read."""
        for source, image in _sources(images):
            try:
                view = self._view(_picture(image), 0)["images"]
            except DataError as error:
                if on_error is None:
                    raise DataError(f"{source}: {error}") from None
                on_error(source, error)
            else:
                yield source, view

    def _predict(self, sources: list[str], views: list["torch.Tensor"], top: int, explain: bool) -> list[Prediction]:
        import torch

        batch = torch.stack(views).to(next(self.model.parameters()).device)
        with torch.no_grad():
            logits = self.model(batch).float() / self.card.temperature
            best = logits.softmax(-1).topk(min(top, len(self.classes)))
        pictures = self._pictures(batch) if explain else [None] * len(sources)
        return [
            Prediction(
                source=source, names=tuple(self.classes[c] for c in classes), probabilities=tuple(row), picture=picture
            )
            for source, row, classes, picture in zip(
                sources, best.values.tolist(), best.indices.tolist(), pictures, strict=True
            )
        ]

    def _pictures(self, batch: "torch.Tensor") -> list[Image.Image]:
        from pipeline.evaluate.gradcam import gradcam, overlay

        maps, _ = gradcam(self.model, batch)
        drawn = overlay(batch, maps, self.card.preprocessing.mean, self.card.preprocessing.std)
        pixels = (drawn.permute(0, 2, 3, 1) * 255).round().byte().cpu().numpy()
        side = (PICTURE_PIXELS, PICTURE_PIXELS)
        return [Image.fromarray(image).resize(side, Image.Resampling.NEAREST) for image in pixels]


def load(
    export: str | Path, *, ground: tuple[int, int, int] | None = None, max_pixels: int | None = None
) -> Classifier:
    """Load the classifier of an export, after its files and its outputs are verified.

    Args:
        export: Folder with model.json, as `runs/EXPERIMENT/STAGE/export`.
        ground: Red, green and blue behind transparent pixels; None = as the model was trained.
        max_pixels: The most pixels of an image; None = 64 million.

    Raises:
        ConfigError: If the export holds a pretrainer.
        HandoverError: If the export is missing, damaged, or computes other outputs than when it was written.
    """
    folder = Path(export)
    Card.read(folder).check_classifier(folder)  # before torch is imported, which takes seconds
    from pipeline.exports.export import load_export

    model, card = load_export(folder)
    own = card.preprocessing.decoding
    decoding = replace(own, ground=ground or own.ground, max_pixels=max_pixels or own.max_pixels)
    return Classifier(model, card, decoding)


def files_of(given: str | Path, left_out: LeftOut | None = None) -> list[Path]:
    """Return the image files that a path stands for.

    Args:
        given: A file, which is returned as it is, even if it is missing; a folder, which stands for the images at any
            depth below it; or a pattern of Python's `glob`, in which `**` stands for any folders. A file or folder whose
            name looks like a pattern is taken as itself.
        left_out: Takes the names of the files of folders that are no images, by the reason.

    Returns:
        The files, sorted by path, each once.

    Raises:
        DataError: If a folder holds no images or cannot be listed, or a pattern matches nothing.
    """
    path, left_out = Path(given), {} if left_out is None else left_out
    if os.path.isdir(path):
        found = _images_below(path, left_out)
        if not found:
            raise DataError(f"{path} holds no images; give a folder of {', '.join(IMAGE_EXTENSIONS)} files")
        return found
    if not glob.has_magic(str(given)) or os.path.exists(path):
        return [path]
    matched: set[Path] = set()
    for match in map(Path, glob.glob(str(given), recursive=True)):
        matched.update(_images_below(match, left_out) if os.path.isdir(match) else [match])
    if not matched:
        raise DataError(f"{given} matches no image; ** stands for any folders, for example photos/**/*.jpg")
    return sorted(matched, key=str)


def _images_below(folder: Path, left_out: LeftOut) -> list[Path]:
    try:
        return [folder / name for name in find_images(folder, left_out)]
    except OSError as error:
        raise DataError(f"{shown(error.filename or str(folder))} cannot be listed ({error.strerror})") from None


def _sources(images: ImageLike | Iterable[ImageLike]) -> Iterator[tuple[str, ImageLike]]:
    """Yield (source, image) of each image; a folder or a pattern stands for its images."""
    if isinstance(images, str | Path | bytes | Image.Image | np.ndarray):
        images = [images]
    for number, image in enumerate(images):
        if not isinstance(image, str | Path):
            yield f"image {number}", image
        else:
            yield from ((str(path), path) for path in files_of(image))


def _picture(image: ImageLike) -> bytes | Image.Image | NDArray[np.uint8]:
    """Return an image as a view takes it; raise DataError with the reason if it is none."""
    if isinstance(image, bytes):
        return image
    if isinstance(image, str | Path):
        return _read(Path(image))
    if isinstance(image, Image.Image):
        return image
    if not isinstance(image, np.ndarray):
        raise DataError(f"a {type(image).__name__} is no image; give a path, bytes, a PIL image or an array")
    if (
        image.dtype != np.uint8
        or image.ndim not in (2, 3)
        or (image.ndim == 3 and image.shape[2] != 3)
        or not image.size
    ):
        raise DataError(f"an array {image.shape} of {image.dtype}; give (H, W, 3) or (H, W) of uint8")
    return image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)


def _read(path: Path) -> bytes:
    """Read the bytes of an image file; raise DataError with the reason if that is impossible."""
    try:
        if not path.is_file():
            raise DataError("no such file" if not path.exists() else "not a file with an image in it")
        if path.stat().st_size > MAX_BYTES:
            raise DataError(f"{path.stat().st_size / 2**20:.0f} MiB; at most {MAX_BYTES >> 20} MiB are read")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})") from None
