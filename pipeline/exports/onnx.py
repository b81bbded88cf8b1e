"""A model as an ONNX file with a free batch size. Needs the packages onnx and onnxruntime.

Every model that a stage exports can be written: a classifier of any family (EfficientViM fused, a timm model if torch can trace
it), and the encoder of a pretrainer. The selective scan of Vision Mamba becomes an ONNX Scan (`onnx_scan.py`).
"""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import ConfigError, EnvironmentProblem, HandoverError
from pipeline.exports.card import FINGERPRINT, Card
from pipeline.exports.export import load_export
from pipeline.exports.fingerprint import TOLERANCE, Fingerprint
from pipeline.exports.onnx_scan import RECURRENCE_DOMAIN, insert_scans, register_symbolics
from pipeline.files import replacing
from pipeline.models.arm import ARM
from pipeline.models.config import VisionMambaConfig
from pipeline.models.efficientvim.fused import fuse
from pipeline.models.efficientvim.model import EfficientViM
from pipeline.models.vision_mamba.any_size import AnySize
from pipeline.models.vision_mamba.model import VisionMamba

OPSET = 17
MAX_BYTES = 2**31  # An ONNX file is one protobuf message, which can be no larger.


def export_to_onnx(folder: Path, out: Path, *, any_size: bool = False) -> float:
    """Write the model of an export as an ONNX file, whole or absent.

    The outputs of a classifier are `logits` and the calibrated `probabilities`. That of a pretrainer is `features`: the mean
    over the tokens of what its linear probe reads. Mean, std, ground and view, and a classifier's classes and temperature,
    are in the file's metadata, as JSON.

    Args:
        folder: The export.
        out: The file, NAME.onnx. An existing one is replaced.
        any_size: Whether the height and width of the images are free too. Position embeddings are then resized to the images.

    Returns:
        The relative error of ONNX Runtime's first output, on the CPU, for the fingerprint batch; with `any_size` also for an
        image of twice the height.

    Raises:
        ConfigError: If `out` does not end in .onnx, or ONNX cannot hold the model.
        EnvironmentProblem: If a package is missing.
        HandoverError: If the export does not load, or the error exceeds the tolerance.
    """
    if out.suffix != ".onnx":
        raise ConfigError(f"--out {out}: give a name that ends in .onnx")
    _need("onnx")
    _need("onnxruntime")
    import onnxruntime

    model, card = load_export(folder)
    if sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values()) > MAX_BYTES:
        raise ConfigError(
            f"{card.model.name} is larger than the 2 GB that one ONNX file can hold; use its export instead"
        )
    network, outputs = _network(model, card, any_size=any_size)
    images = Fingerprint.read(folder / FINGERPRINT).images
    refusals: tuple[type[Exception], ...] = (
        RuntimeError,
        TypeError,
        ValueError,
        AssertionError,
        *_refusals_of_the_runtime(),
    )
    trials = [images]
    if any_size:
        height, width = card.model.image_size
        trials.append(torch.randn(1, 3, 2 * height, width, generator=torch.Generator().manual_seed(0)))
    with replacing(out) as temporary, torch.no_grad():
        try:
            wanted = [network(trial)[0] for trial in trials]
            size = card.model.image_size
            write_onnx(network, temporary, size, outputs, any_size=any_size, metadata=_described(card))
            session = onnxruntime.InferenceSession(temporary, providers=["CPUExecutionProvider"])
            found = [torch.from_numpy(session.run(None, {"images": trial.numpy()})[0]) for trial in trials]
        except refusals as refusal:
            reason = (str(refusal).strip().splitlines() or [type(refusal).__name__])[-1][:200]
            free = " for images of any size; leave out --any-size" if any_size else ""
            raise ConfigError(f"{card.model.name} cannot be written as ONNX{free} ({reason})") from None
        error = max(Fingerprint(*pair).error(one) for *pair, one in zip(trials, wanted, found, strict=True))
        if not error <= TOLERANCE:
            raise HandoverError(
                f"{folder} is not written as ONNX: the file's outputs for the fingerprint batch have a relative error of"
                f" {error:.1e} (allowed {TOLERANCE:.0e}); use other versions of torch and onnxruntime"
            )
    return error


def _refusals_of_the_runtime() -> tuple[type[Exception], ...]:
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    return state.Fail, state.InvalidArgument, state.InvalidGraph, state.NotImplemented, state.RuntimeException


def _described(card: Card) -> dict[str, Any]:
    """Return how to prepare images, and how to read a classifier's outputs."""
    how = card.preprocessing
    about: dict[str, Any] = {"mean": how.mean, "std": how.std, "ground": how.ground}
    about |= {"view": how.view.model_dump(mode="json")}
    if card.kind == "classifier":
        about |= {"classes": card.classes, "temperature": card.temperature}
    return about


def _network(model: nn.Module, card: Card, *, any_size: bool) -> tuple[nn.Module, tuple[str, ...]]:
    """Return what is written for a verified model, and the names of its outputs."""
    if isinstance(model, ARM):
        if any_size:
            raise ConfigError(f"{card.model.name} is a pretrainer, whose clusters have one size; leave out --any-size")
        return _Encoder(model), ("features",)
    if isinstance(model, EfficientViM) and not any_size:  # the fused form has its maps' sizes as constants
        model = fuse(model)
    if any_size and isinstance(model, VisionMamba):
        assert isinstance(card.model, VisionMambaConfig)
        model = AnySize(model, card.model.order, card.model.cluster_size)
    return _WithProbabilities(model, card.temperature), ("logits", "probabilities")


class _Encoder(nn.Module):
    """Returns the mean over the tokens of a pretrainer's features."""

    def __init__(self, model: ARM) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor]:
        return (self.model.encode(images).mean(1),)


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
    model: nn.Module,
    path: Path,
    image_size: tuple[int, int],
    outputs: tuple[str, ...] = ("logits",),
    *,
    any_size: bool = False,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Write a model as an ONNX file with the input `images`, fp32.

    Args:
        model: The model; EfficientViM best fused, not packed, and a Vision Mamba of free size as an `AnySize`.
        path: The file.
        image_size: Height and width of the images, in pixels.
        outputs: Names of what the model returns.
        any_size: Whether height and width are free as well as the batch size. Runtimes are fastest with static shapes.
        metadata: Values that the file carries as JSON, by name.

    Returns:
        `path`.

    Raises:
        EnvironmentProblem: If the package onnx is missing.
    """
    _need("onnx")  # torch's exporter uses it
    import onnx

    register_symbolics()
    axes: dict[str, dict[int, str]] = {name: {0: "batch"} for name in ("images", *outputs)}
    height, width = image_size
    if any_size:
        axes["images"] |= {2: "height", 3: "width"}
        # Traced at another size, so that no step is left out that this one would not need.
        height, width = 2 * height, 3 * width
    images = torch.zeros(2, 3, height, width)
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
            dynamic_axes=axes,
            custom_opsets={RECURRENCE_DOMAIN: 1},
        )
    graph = onnx.load(path)
    insert_scans(graph)
    onnx.helper.set_model_props(graph, {name: json.dumps(value) for name, value in (metadata or {}).items()})
    onnx.save(graph, path)
    return path
