"""torch.export and torch.compile at inference: one whole graph for every family, with the model's own outputs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.models import build_model
from pipeline.models.arm import ARM
from pipeline.models.config import DecoderConfig, VisionMambaConfig
from pipeline.models.efficientvim.fused import fuse

SMALL: dict[str, Any] = {"num_classes": 3, "image_size": 32}
TINY: dict[str, Any] = {"embed_dim": 16, "depth": 2, "image_size": (32, 40), "num_classes": 3}
NARROW: dict[str, Any] = {"widths": (16, 24, 32), "depths": (1, 2, 1), "states": (16, 9, 4)}


def arm() -> nn.Module:
    config = VisionMambaConfig(name="vim_nano", embed_dim=16, depth=2)
    return ARM(config, DecoderConfig(width=16, depth=1, num_heads=2))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "vim": lambda: build_model("vim_nano", **TINY),
    "four directions": lambda: build_model("vim_nano", **TINY, directions=4, pool="mean", mlp="swiglu", norm="layer"),
    "ssmixup everywhere": lambda: build_model("vim_nano", **TINY, ssmixup={"nu": 0.5, "everywhere": True}),
    "ssmixup learned": lambda: build_model("vim_nano", **TINY, ssmixup={"everywhere": True}),
    "ssmixup shared C": lambda: build_model(
        "vim_nano", **TINY, ssmixup={"nu": 0.5, "readout": "shared_C", "everywhere": True}
    ),
    "pretrainer": arm,
    "efficientvim": lambda: build_model("efficientvim_nano", **SMALL, **NARROW),
    "efficientvim, fused": lambda: fuse(build_model("efficientvim_nano", **SMALL, **NARROW).eval()),  # type: ignore[arg-type]
    "vssd": lambda: build_model("vssd_micro", num_classes=3, image_size=64, width=16, depths=(1, 1, 1, 1)),
    "wide resnet": lambda: build_model("wrn_28_2", num_classes=3, depth=10),
    "timm": lambda: build_model("timm/resnet10t", **SMALL),
}


def model_and_size(name: str) -> tuple[nn.Module, tuple[int, int]]:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for parameter in model.parameters():
        if parameter.shape == (1,):
            parameter.data.fill_(0.3)  # a fresh nu is 0 and would blend nothing
    size = getattr(model, "image_size", (64, 64) if name == "vssd" else (32, 32))
    return model, size


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("name", MODELS)
def test_an_exported_program_takes_any_batch(name: str) -> None:
    model, size = model_and_size(name)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (torch.randn(3, 3, *size),), dynamic_shapes=({0: batch},)).module()
    for number in (2, 5):
        images = torch.randn(number, 3, *size)
        with torch.no_grad():
            assert error(program(images), model(images)) < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_a_model_compiles_as_one_graph_at_inference(name: str) -> None:
    model, size = model_and_size(name)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    images = torch.randn(3, 3, *size)
    with torch.no_grad():
        assert error(compiled(images), model(images)) < 1e-5


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside torch
def test_inductor_runs_a_vision_mamba() -> None:
    model = build_model("vim_nano", num_classes=3, embed_dim=16, depth=1).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert error(torch.compile(model, fullgraph=True)(images), model(images)) < 1e-5


def test_a_saved_program_of_a_vision_mamba_loads_again(tmp_path: Any) -> None:
    model, size = model_and_size("vim")
    images = torch.randn(2, 3, *size)
    torch.export.save(torch.export.export(model, (images,)), tmp_path / "vim.pt2")
    program = torch.export.load(tmp_path / "vim.pt2").module()
    with torch.no_grad():
        assert error(program(images), model(images)) < 1e-5


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch's compiler looks at it
def test_training_compiles_around_the_scan_with_its_gradients() -> None:
    """In training a call stays outside the graph, because a node has no gradient."""
    model, size = model_and_size("vim")
    compiled = torch.compile(model, backend="eager")
    images = torch.randn(2, 3, *size)
    found, wanted = (
        torch.autograd.grad(net(images).square().sum(), list(model.parameters())) for net in (compiled, model)
    )
    assert max(error(a, b) for a, b in zip(found, wanted, strict=True) if b.abs().max() > 1e-6) < 1e-4
