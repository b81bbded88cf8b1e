"""A frozen teacher from timm. A teacher from an export of ours is simply `export.load_export`."""

from pathlib import Path

import torch

from pipeline.errors import ConfigError, HandoverError
from pipeline.exports.prefetch import missing_weights
from pipeline.exports.weights import load_weights
from pipeline.models.config import TIMM_PREFIX, TimmConfig
from pipeline.models.timm_model import TimmModel


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
    if report.fresh or report.dropped:
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
            f" ({str(error).splitlines()[0]}); choose another teacher or model.image_size"
        ) from error
    return model
