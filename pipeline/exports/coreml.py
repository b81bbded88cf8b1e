"""A classifier as a Core ML program (.mlpackage), for Xcode's performance report and for apps. Needs coremltools.

Any machine can write the program; only macOS and iOS run it.
"""

import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.errors import ConfigError, EnvironmentProblem
from pipeline.exports.card import Card
from pipeline.exports.export import load_classifier
from pipeline.files import publish
from pipeline.models.config import VisionMambaConfig
from pipeline.models.efficientvim.fused import fuse
from pipeline.models.efficientvim.model import EfficientViM


def export_to_coreml(folder: Path, out: Path) -> Card:
    """Write the classifier of an export as a Core ML program, whole or absent. EfficientViM is fused first.

    Args:
        folder: The export.
        out: The program, NAME.mlpackage, which must not exist.

    Returns:
        The export's card.

    Raises:
        ConfigError: If `out` exists or does not end in .mlpackage, or Core ML cannot hold the model.
        EnvironmentProblem: If the package coremltools is missing.
        HandoverError: If the export does not load.
    """
    if out.exists() or out.suffix != ".mlpackage":
        raise ConfigError(f"--out {out}: give a name that ends in .mlpackage and does not exist yet")
    model, card = load_classifier(folder)
    if isinstance(card.model, VisionMambaConfig):
        raise ConfigError(
            f"{card.model.name} cannot be written as a Core ML program, which has no operator for its scan;"
            " efficientvim_*, vssd_* and most of timm can"
        )
    program = convert_to_coreml(fuse(model) if isinstance(model, EfficientViM) else model, card.model.image_size)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        whole = Path(scratch) / out.name  # coremltools insists on the ending .mlpackage
        program.save(str(whole))
        publish(whole, out)
    return card


def convert_to_coreml(model: nn.Module, image_size: tuple[int, int], *, batch: int = 1, half: bool = True) -> Any:
    """Convert a model to a Core ML program with the input `images` and the output `logits`.

    All shapes are fixed, because the Neural Engine takes no others.

    Args:
        model: The classifier; EfficientViM best fused, not packed.
        image_size: Height and width of the images, in pixels.
        batch: Images per call.
        half: Whether the program computes in fp16, as the Neural Engine does.

    Returns:
        coremltools' model, to be saved as NAME.mlpackage.

    Raises:
        EnvironmentProblem: If the package coremltools is missing.
    """
    with warnings.catch_warnings():
        # coremltools warns of every newer torch, and of what it lacks outside of macOS.
        warnings.simplefilter("ignore")
        logging.getLogger("coremltools").setLevel(logging.ERROR)
        try:
            import coremltools as ct
        except ImportError:
            raise EnvironmentProblem(
                "writing Core ML needs the package coremltools: pip install 'visionmamba-pipeline[coreml]'"
            ) from None
        program = torch.export.export(model.eval(), (torch.zeros(batch, 3, *image_size),)).run_decompositions({})
        return ct.convert(
            program,
            outputs=[ct.TensorType(name="logits")],
            convert_to="mlprogram",
            minimum_deployment_target=ct.target.iOS17,
            compute_precision=ct.precision.FLOAT16 if half else ct.precision.FLOAT32,
            skip_model_load=True,
        )
