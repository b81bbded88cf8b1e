"""A classifier as an ONNX file with a free batch size. Needs the packages onnx and onnxruntime.

EfficientViM (fused), VSSD and the timm models that torch can trace are supported. Vision Mamba is not: ONNX has no
operator for its scan, which would unroll into thousands of nodes a block.
"""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import ConfigError, EnvironmentProblem, HandoverError
from pipeline.exports.card import FINGERPRINT
from pipeline.exports.export import load_classifier
from pipeline.exports.fingerprint import TOLERANCE, Fingerprint
from pipeline.files import replacing
from pipeline.models.efficientvim.fused import fuse
from pipeline.models.efficientvim.model import EfficientViM

OPSET = 17


def export_to_onnx(folder: Path, out: Path) -> float:
    """Write the classifier of an export as an ONNX file, whole or absent.

    Its outputs are `logits` and the calibrated `probabilities`. Classes, mean, std, ground and temperature are in the file's
    metadata, as JSON.

    Args:
        folder: The export.
        out: The file, NAME.onnx. An existing one is replaced.

    Returns:
        The relative error of ONNX Runtime's logits, on the CPU, for the fingerprint batch.

    Raises:
        ConfigError: If `out` does not end in .onnx, or ONNX cannot hold the model.
        EnvironmentProblem: If a package is missing.
        HandoverError: If the export does not load, or the error exceeds the tolerance.
    """
    if out.suffix != ".onnx":
        raise ConfigError(f"--out {out}: give a name that ends in .onnx")
    _need("onnx")
    _need("onnxruntime")
    import onnx
    import onnxruntime

    model, card = load_classifier(folder)
    with replacing(out) as temporary:
        try:
            network = fuse(model) if isinstance(model, EfficientViM) else model
            outputs = ("logits", "probabilities")
            write_onnx(_WithProbabilities(network, card.temperature), temporary, card.model.image_size, outputs)
        except (RuntimeError, TypeError, ValueError) as refusal:  # tracing and the exporter raise these
            reason = str(refusal).strip().splitlines()[-1][:200]
            raise ConfigError(
                f"{card.model.name} cannot be written as ONNX ({reason}); efficientvim_*, vssd_* and most of timm can"
            ) from None
        graph = onnx.load(temporary)
        how = card.preprocessing
        about: dict[str, Any] = {"classes": card.classes, "temperature": card.temperature}
        about |= {"mean": how.mean, "std": how.std, "ground": how.ground, "view": how.view.model_dump(mode="json")}
        onnx.helper.set_model_props(graph, {name: json.dumps(value) for name, value in about.items()})
        onnx.save(graph, temporary)
        fingerprint = Fingerprint.read(folder / FINGERPRINT)
        session = onnxruntime.InferenceSession(temporary, providers=["CPUExecutionProvider"])
        error = fingerprint.error(torch.from_numpy(session.run(None, {"images": fingerprint.images.numpy()})[0]))
        if not error <= TOLERANCE:
            raise HandoverError(
                f"{folder} is not written as ONNX: the file's outputs for the fingerprint batch have a relative error of"
                f" {error:.1e} (allowed {TOLERANCE:.0e}); use other versions of torch and onnxruntime"
            )
    return error


def _need(package: str) -> None:
    try:
        __import__(package)
    except ImportError:
        raise EnvironmentProblem(
            f"writing ONNX needs the package {package}: pip install 'visionmamba-pipeline[onnx]'"
        ) from None


class _WithProbabilities(nn.Module):
    """Returns a classifier's logits, and the probabilities after temperature scaling."""

    def __init__(self, model: nn.Module, temperature: float) -> None:
        super().__init__()
        self.model, self.temperature = model, temperature

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.model(images)
        return logits, (logits / self.temperature).softmax(-1)


def write_onnx(
    model: nn.Module, path: Path, image_size: tuple[int, int], outputs: tuple[str, ...] = ("logits",)
) -> Path:
    """Write a model as an ONNX file with the input `images`, fp32.

    Only the batch size is free: runtimes are fastest with static shapes.

    Args:
        model: The classifier; EfficientViM best fused, not packed.
        path: The file.
        image_size: Height and width of the images, in pixels.
        outputs: Names of what the model returns.

    Returns:
        `path`.

    Raises:
        EnvironmentProblem: If the package onnx is missing.
    """
    _need("onnx")  # torch's exporter uses it
    images = torch.zeros(2, 3, *image_size)
    with warnings.catch_warnings():
        # torch calls its tracing exporter old; the new one needs onnxscript and leaves more transposes in the graph.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model.eval(),
            (images,),
            str(path),
            dynamo=False,
            opset_version=OPSET,
            input_names=["images"],
            output_names=list(outputs),
            dynamic_axes={name: {0: "batch"} for name in ("images", *outputs)},
        )
    return path
