"""The packed form of Vision Mamba equals the model within rounding, for every variant and option."""

import copy

import pytest
import torch

from pipeline.errors import EnvironmentProblem
from pipeline.evaluate.speed import packed_form
from pipeline.models import build_model
from pipeline.models.variants import VISION_MAMBA_VARIANTS
from pipeline.models.vision_mamba.model import VisionMamba
from pipeline.models.vision_mamba.packed import OtherBlock, pack
from pipeline.ops.native import build
from pipeline.ops.native.vision_library import vision_library

SMALL = {"image_size": (32, 48), "patch_size": 8, "cluster_size": 16, "embed_dim": 20, "depth": 3, "num_classes": 5}


def trained(name: str, **fields: object) -> VisionMamba:
    """A model whose weights are all away from where they began."""
    torch.manual_seed(0)
    model = build_model(name, **{**SMALL, **fields}).eval()
    assert isinstance(model, VisionMamba)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model


OPTIONS = [
    *({"directions": d, "order": o} for d in (1, 2, 4) for o in ("raster", "cluster")),
    {"d_state": 8, "d_conv": 3, "expand": 1},
    {"d_state": 24, "norm": "layer", "mlp": "swiglu"},
    {"norm": "rms", "mlp": "swiglu", "cls_token": "none", "pool": "mean"},
    {"stride": 4},
    {"directions": 4, "cls_token": "first", "combine": "sum"},
    {"num_classes": 0},
    {"ssmixup": {}},
    {"ssmixup": {"everywhere": True}},
]


@pytest.mark.parametrize("fields", OPTIONS, ids=str)
def test_packing_changes_no_logits(fields: dict) -> None:
    model = trained("vim_tiny", **fields)
    images = torch.randn(3, 3, 32, 48)
    packed = pack(model)
    with torch.no_grad():
        torch.testing.assert_close(packed(images), model(images), rtol=1e-5, atol=1e-5)
    blends = bool(model.ssmixup and model.ssmixup.everywhere)
    assert any(isinstance(block, OtherBlock) for block in packed.blocks) == blends


@pytest.mark.parametrize("name", VISION_MAMBA_VARIANTS)
def test_every_variant_packs(name: str) -> None:
    model, images = trained(name), torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        want, found = model(images), pack(model)(images)
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


def test_the_number_of_threads_changes_no_bit() -> None:
    packed, images = pack(trained("vim_tiny")), torch.randn(2, 3, 32, 48)
    outputs = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        outputs.append(packed(images))
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_packing_leaves_the_model_as_it_was() -> None:
    model, images = trained("arm_base"), torch.randn(1, 3, 32, 48)
    names, before = list(model.state_dict()), model(images)
    packed = pack(model)
    assert list(model.state_dict()) == names
    assert torch.equal(model(images), before)
    assert torch.equal(copy.deepcopy(packed)(images), packed(images))
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    torch.testing.assert_close(packed(images), before, rtol=1e-5, atol=1e-5)


def test_a_packed_model_takes_fp32_images_of_its_size() -> None:
    packed = pack(trained("vim_tiny"))
    assert packed.image_size == (32, 48)
    with pytest.raises(ValueError, match=r"takes fp32 on the CPU, not torch\.bfloat16"):
        packed(torch.zeros(1, 3, 32, 48).bfloat16())
    for shape in ((2, 1, 32, 48), (3, 32, 48), (1, 3, 48, 32)):
        with pytest.raises(ValueError, match=r"takes images \(B, 3, 32, 48\), not \("):
            packed(torch.zeros(shape))
    assert packed(torch.zeros(0, 3, 32, 48)).shape == (0, 5)


def test_without_a_compiler_packing_is_refused_and_the_model_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    vision_library.cache_clear()
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    model = trained("vim_tiny")
    with pytest.raises(EnvironmentProblem, match=r"no C\+\+ compiler .*; the model itself needs none"):
        pack(model)
    assert packed_form(model) is model
