"""A frozen teacher from timm. A teacher from an export of ours is simply `export.load_export`."""

from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.errors import ConfigError, HandoverError, first_line
from pipeline.exports.card import Preprocessing
from pipeline.exports.prefetch import missing_weights
from pipeline.exports.weights import load_weights
from pipeline.models.config import TIMM_PREFIX, TimmConfig
from pipeline.models.timm_model import TimmModel
from pipeline.ops.torchvision_cpu import allow_torchvision


@dataclass(frozen=True)
class TimmInput:
    """What a timm model was trained on.

    Attributes:
        preprocessing: Its normalisation.
        image_size: (height, width) in pixels.
    """

    preprocessing: Preprocessing
    image_size: tuple[int, int]


def timm_input(name: str) -> TimmInput | None:
    """Return what timm's `pretrained_cfg` says of a model's images; None if timm does not know such weights."""
    allow_torchvision()
    import timm

    try:
        known = timm.get_pretrained_cfg(name)
    except RuntimeError:  # timm knows the model, but no weights of that tag
        return None
    if known is None:
        return None
    _, height, width = known.input_size
    return TimmInput(Preprocessing(mean=tuple(known.mean), std=tuple(known.std)), (height, width))


def timm_teacher(name: str, weights: Path, num_classes: int, image_size: tuple[int, int]) -> TimmModel:
    """Build a timm model with all its weights, the classifier's too, from a file. Nothing is downloaded.

    Args:
        name: timm's name of the model.
        weights: Its weights file.
        num_classes: Classes of the dataset.
        image_size: Height and width of the images, in pixels.

    Returns:
        The model in eval mode, on the CPU.

    Raises:
        HandoverError: If the name, the file, the classes or the image size do not fit.
    """
    if not weights.is_file():
        raise missing_weights(weights, TIMM_PREFIX + name)
    config = TimmConfig(name=TIMM_PREFIX + name, num_classes=num_classes, image_size=image_size)
    try:
        model = TimmModel(**config.model_dump()).eval()
    except ConfigError as error:
        raise HandoverError(f"teacher.timm={name}: {error}") from None
    report = load_weights(model, weights)
    if report.fresh or any(name.startswith(model.fresh()) for name in report.dropped):
        raise HandoverError(
            f"teacher.weights={weights} is no classifier of {num_classes} classes ({report}); a teacher must know the"
            " dataset's classes"
        )
    try:
        with torch.no_grad():
            model(torch.zeros(1, 3, *image_size))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise HandoverError(
            f"teacher.timm={name} takes no images of {image_size[0]} x {image_size[1]} pixels"
            f" ({first_line(error)}); choose another teacher or teacher.image_size"
        ) from error
    return model
