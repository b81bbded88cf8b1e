"""Frozen teachers from timm. A teacher from one of our exports is simply `export.load_export`."""

from pathlib import Path

import torch
from torch import nn

from pipeline.errors import ConfigError, HandoverError
from pipeline.models.config import TIMM_PREFIX, TimmConfig
from pipeline.models.timm_model import TimmModel
from pipeline.models.weights import load_weights


def timm_teacher(name: str, weights: Path, num_classes: int, image_size: tuple[int, int]) -> nn.Module:
    """The timm model `name` with a weights file from disk, classifier and all (nothing is downloaded).

    Raises HandoverError if the name, the file or the images do not fit.
    """
    config = TimmConfig(name=TIMM_PREFIX + name, num_classes=num_classes, image_size=image_size)
    try:
        model = TimmModel(**config.model_dump()).eval()
    except ConfigError as error:
        raise HandoverError(str(error)) from None
    report = load_weights(model, weights)
    if report.fresh or report.dropped:
        raise HandoverError(
            f"{weights} does not answer for {num_classes} classes: {report}; a teacher needs the dataset's classes"
        )
    try:
        with torch.no_grad():
            model(torch.zeros(1, 3, *image_size))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise HandoverError(f"timm's {name} takes no images of {image_size}: {str(error).splitlines()[0]}") from error
    return model
