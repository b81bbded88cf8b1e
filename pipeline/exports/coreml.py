"""A model as a Core ML program (.mlpackage), for Xcode's performance report and for apps. Needs requirements-coreml.txt.

It is written on any machine; only macOS and iOS run it.
"""

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.errors import EnvironmentProblem


def write_coreml(
    model: nn.Module, path: Path, image_size: tuple[int, int], *, batch: int = 1, half: bool = True
) -> Any:
    """`model` (in eval mode; EfficientViM best fused, not packed) for images (batch, 3, *image_size); coremltools' model.

    Input `images`, output `logits`. All shapes are fixed: the Neural Engine takes no others. `half` computes in fp16, as that
    engine does. Raises EnvironmentProblem without the package coremltools.
    """
    with warnings.catch_warnings():
        # It warns of every newer torch, and of what it lacks outside of macOS; the test interprets what it has made.
        warnings.simplefilter("ignore")
        logging.getLogger("coremltools").setLevel(logging.ERROR)
        try:
            import coremltools as ct
        except ImportError:
            raise EnvironmentProblem(
                "writing Core ML needs the package coremltools: pip install -r requirements-coreml.txt"
            ) from None
        program = torch.export.export(model.eval(), (torch.zeros(batch, 3, *image_size),)).run_decompositions({})
        converted = ct.convert(
            program,
            outputs=[ct.TensorType(name="logits")],
            convert_to="mlprogram",
            minimum_deployment_target=ct.target.iOS17,
            compute_precision=ct.precision.FLOAT16 if half else ct.precision.FLOAT32,
            skip_model_load=True,
        )
        converted.save(str(path))
    return converted
