"""Frozen teachers from timm. A teacher from one of our exports is simply `export.load_export`."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from pipeline.errors import HandoverError
from pipeline.ops.torchvision_cpu import allow_torchvision


def timm_teacher(name: str, weights: Path, num_classes: int, image_size: tuple[int, int]) -> nn.Module:
    """The timm model `name` with a weights file from disk (nothing is downloaded): safetensors, or a plain state dict
    that torch loads with weights_only. Raises HandoverError if the name, the file or the images do not fit."""
    allow_torchvision()
    import timm

    if not timm.is_model(name):
        close = ", ".join(timm.list_models(f"*{name.split('.')[0].split('_')[0]}*")[:5])
        raise HandoverError(f"timm has no model {name!r}" + (f"; near it: {close}" if close else ""))
    model = timm.create_model(name, pretrained=False, num_classes=num_classes).eval()
    try:
        state: Any = load_file(weights) if weights.suffix == ".safetensors" else torch.load(weights, weights_only=True)
        model.load_state_dict(state.get("model", state))
        with torch.no_grad():
            model(torch.zeros(1, 3, *image_size))
    except Exception as error:  # three libraries, each with its own way to say that something does not fit
        raise HandoverError(
            f"{weights} with timm's {name} does not fit {num_classes} classes at {image_size}: {str(error).splitlines()[0]}"
        ) from error
    return model
