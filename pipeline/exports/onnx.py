"""A model as an ONNX file with a free batch size. Needs requirements-onnx.txt.

What the format allows: EfficientViM (fused), VSSD, and timm's models that torch can trace. Not Vision Mamba: its scan is no
operator of ONNX, and unrolled it would be thousands of nodes a block.
"""

import json
import os
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from pipeline.errors import ConfigError, EnvironmentProblem, HandoverError
from pipeline.exports.card import PROBE
from pipeline.exports.export import PROBE_TOLERANCE, load_export
from pipeline.models.efficientvim.fused import fuse
from pipeline.models.efficientvim.model import EfficientViM

OPSET = 17


def export_to_onnx(folder: Path, out: Path) -> float:
    """The classifier of an export as the ONNX file `out`, whole or absent; its relative error on the stored probe batch.

    The error is what ONNX Runtime answers on the CPU against what the export says it should. Classes and preprocessing go into
    the file's metadata, as JSON. Raises ConfigError for a model that ONNX cannot hold, HandoverError for a wrong answer.
    """
    if out.suffix != ".onnx":
        raise ConfigError(f"--out {out}: give a name that ends in .onnx")
    _need("onnx")
    _need("onnxruntime")
    import onnx
    import onnxruntime

    model, card = load_export(folder)
    if card.kind != "classifier":
        raise ConfigError(f"{folder} is a {card.kind}, which answers nothing by itself; give a classifier's export")
    temporary = out.with_name(f".{out.name}.tmp")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        try:
            write_onnx(fuse(model) if isinstance(model, EfficientViM) else model, temporary, card.model.image_size)
        except (
            RuntimeError,
            TypeError,
            ValueError,
        ) as refusal:  # torch's errors of tracing and of the format are these
            reason = str(refusal).strip().splitlines()[-1][:200]
            raise ConfigError(
                f"{card.model.name} cannot be written as ONNX ({reason}); efficientvim_*, vssd_* and most of timm can"
            ) from None
        graph = onnx.load(temporary)
        about = {"classes": card.classes, "mean": card.preprocessing.mean, "std": card.preprocessing.std}
        onnx.helper.set_model_props(graph, {name: json.dumps(value) for name, value in about.items()})
        onnx.save(graph, temporary)
        probe = load_file(folder / PROBE)
        session = onnxruntime.InferenceSession(temporary, providers=["CPUExecutionProvider"])
        answer = torch.from_numpy(session.run(None, {"images": probe["images"].numpy()})[0])
        error = float((answer - probe["answer"]).abs().max() / probe["answer"].abs().max().clamp(min=1e-12))
        if not error <= PROBE_TOLERANCE:
            raise HandoverError(f"{folder} as ONNX answers its probe batch with a relative error of {error:.1e}")
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
    return error


def _need(package: str) -> None:
    try:
        __import__(package)
    except ImportError:
        raise EnvironmentProblem(
            f"writing ONNX needs the package {package}: pip install -r requirements-onnx.txt"
        ) from None


def write_onnx(model: nn.Module, path: Path, image_size: tuple[int, int]) -> Path:
    """`model` (in eval mode; EfficientViM best fused, not packed) for images (batch, 3, *image_size), fp32.

    Input `images`, output `logits`. Height and width are fixed: static shapes are what runtimes are fast with.
    Raises EnvironmentProblem without the package onnx.
    """
    _need("onnx")  # the exporter's
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
