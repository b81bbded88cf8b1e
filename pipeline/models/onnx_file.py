"""A model as an ONNX file with a free batch size. Needs requirements-onnx.txt."""

import warnings
from pathlib import Path

import torch
from torch import nn

from pipeline.errors import EnvironmentProblem

OPSET = 17


def write_onnx(model: nn.Module, path: Path, image_size: tuple[int, int]) -> Path:
    """`model` (in eval mode; EfficientViM best fused, not packed) for images (batch, 3, *image_size), fp32.

    Input `images`, output `logits`. Height and width are fixed: static shapes are what runtimes are fast with.
    Raises EnvironmentProblem without the package onnx.
    """
    try:
        import onnx  # noqa: F401 - the exporter's
    except ImportError:
        raise EnvironmentProblem("writing ONNX needs the package onnx: pip install -r requirements-onnx.txt") from None
    images = torch.zeros(2, 3, *image_size)
    with warnings.catch_warnings():
        # The exporter by tracing is announced as old; the new one needs onnxscript and leaves more transposes in the graph.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model.eval(),
            (images,),
            str(path),
            dynamo=False,
            opset_version=OPSET,
            input_names=["images"],
            output_names=["logits"],
            dynamic_axes={"images": {0: "batch"}, "logits": {0: "batch"}},
        )
    return path
