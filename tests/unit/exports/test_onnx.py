"""ONNX files: ONNX Runtime gives what our models give, at any batch and, where asked for, at any size."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.exports.export import load_export
from pipeline.exports.transfer import transfer
from pipeline.models import build_from_config, build_model
from pipeline.models.__main__ import main
from pipeline.ops.traced import _softplus
from tests.unit.exports.test_export import NARROW, exported, exported_family

pytest.importorskip("onnx", reason="pip install 'visionmamba-pipeline[onnx]'")
runtime = pytest.importorskip("onnxruntime", reason="pip install 'visionmamba-pipeline[onnx]'")

TINY = {"embed_dim": 16, "depth": 2}
MAMBAS: dict[str, dict[str, Any]] = {
    "vim": {},
    "arm": {"directions": 4, "pool": "mean", "mlp": "swiglu", "norm": "layer", "expand": 1},
    "first, summed": {"directions": 4, "cls_token": "first", "combine": "sum"},
    "clusters": {"order": "cluster", "directions": 4, "pool": "mean", "cls_token": "none"},
    "ssmixup that is left out": {"ssmixup": {"nu": "learned"}},
    "ssmixup everywhere": {"ssmixup": {"nu": 0.5, "everywhere": True}},
    "ssmixup with a shared C": {"ssmixup": {"nu": 0.5, "readout": "shared_C", "everywhere": True}},
}


def run(path: Path, images: torch.Tensor) -> torch.Tensor:
    """Return the first output of ONNX Runtime on the CPU."""
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    assert found.shape == wanted.shape
    return float((found - wanted).abs().max() / wanted.abs().max())


def written(folder: Path, *words: str) -> Path:
    assert main(["onnx", str(folder), "--out", str(folder.parent / "out/model.onnx"), *words]) == 0
    return folder.parent / "out" / "model.onnx"


def test_the_file_has_logits_probabilities_and_how_to_prepare_images(tmp_path: Path) -> None:
    import onnx

    model = exported_family(tmp_path / "export", "efficientvim_nano", 2.5, image_size=64, **NARROW)
    path = written(tmp_path / "export")
    images = torch.randn(5, 3, 64, 64)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    logits, probabilities = session.run(None, {"images": images.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(logits), model(images), rtol=1e-3, atol=1e-4)
        calibrated = (model(images) / 2.5).softmax(-1)
    torch.testing.assert_close(torch.from_numpy(probabilities), calibrated, rtol=1e-3, atol=1e-4)
    about = {p.key: json.loads(p.value) for p in onnx.load(path).metadata_props}
    view = load_export(tmp_path / "export")[1].preprocessing.view.model_dump(mode="json")
    known = {"mean": [0.5] * 3, "std": [0.5] * 3, "ground": [255] * 3, "view": view}
    assert about == {"classes": ["a", "b", "c"], "temperature": 2.5, **known}
    assert [p.name for p in path.parent.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize("kind", MAMBAS)
def test_a_vision_mamba_of_odd_size_at_any_batch(kind: str, tmp_path: Path) -> None:
    size = (32, 40) if kind == "clusters" else (33, 45)
    model = exported_family(tmp_path / "export", "vim_nano", image_size=size, **TINY, **MAMBAS[kind])
    path = written(tmp_path / "export")
    for batch in (1, 3, 8):
        images = torch.randn(batch, 3, *size)
        with torch.no_grad():
            assert error(run(path, images), model(images)) < 1e-4


@pytest.mark.parametrize("kind", MAMBAS)
def test_a_vision_mamba_at_any_size_is_the_model_that_would_start_from_it_there(kind: str, tmp_path: Path) -> None:
    exported_family(tmp_path / "export", "vim_nano", image_size=32, **TINY, **MAMBAS[kind])
    path = written(tmp_path / "export", "--any-size")
    source, card = load_export(tmp_path / "export")
    for size in ((32, 32), (24, 56), (40, 16) if kind == "clusters" else (45, 33)):
        model = build_from_config(card.model.model_copy(update={"image_size": size})).eval()
        transfer(source, model, tmp_path / "export")
        images = torch.randn(3, 3, *size)
        with torch.no_grad():
            assert error(run(path, images), model(images)) < 1e-4


@pytest.mark.parametrize("name", ["efficientvim_nano", "vssd_micro", "wrn_28_2", "timm/resnet18"])
def test_other_families_take_images_of_any_size(name: str, tmp_path: Path) -> None:
    more = {"depths": (1, 1, 1, 1), "width": 16} if name == "vssd_micro" else NARROW if "efficient" in name else {}
    model = exported_family(tmp_path / "export", name, image_size=64, **more)
    path = written(tmp_path / "export", "--any-size")
    for size in ((64, 64), (96, 128)):
        images = torch.randn(2, 3, *size)
        with torch.no_grad():
            assert error(run(path, images), model(images)) < 1e-4


def test_a_pretrainer_is_written_as_its_encoder(tmp_path: Path) -> None:
    model = exported(tmp_path / "export", "pretrainer")
    path = written(tmp_path / "export")
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        assert error(run(path, images), model.encode(images).mean(1)) < 1e-4


def test_long_step_sizes_and_many_steps_stay_finite(tmp_path: Path) -> None:
    """Decays down to exp(-1000): a closed form that divides by a decay would overflow."""
    from pipeline.exports.onnx import write_onnx

    torch.manual_seed(0)
    model = build_model("vim_nano", num_classes=3, image_size=(64, 68), **TINY).eval()
    for name, value in model.named_parameters():
        if "dt_proj" in name and name.endswith("bias"):
            value.data.uniform_(-8, 60)
    images = torch.randn(2, 3, 64, 68)
    path = write_onnx(model, tmp_path / "m.onnx", (64, 68))
    with torch.no_grad():
        assert error(run(path, images), model(images)) < 1e-4


def test_what_onnx_cannot_hold_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exported(tmp_path / "arm", "pretrainer")
    exported_family(tmp_path / "vit", "timm/test_vit", image_size=64)
    for name, said in (("arm", "is a pretrainer"), ("vit", "for images of any size; leave out --any-size")):
        assert main(["onnx", str(tmp_path / name), "--out", str(tmp_path / "x.onnx"), "--any-size"]) == 2
        assert said in capsys.readouterr().err
    assert not list(tmp_path.glob("*x.onnx*"))
    assert main(["onnx", str(tmp_path / "vit"), "--out", str(tmp_path / "model.bin")]) == 2
    assert "ends in .onnx" in capsys.readouterr().err


def test_softplus_of_plain_operators_keeps_the_digits_of_small_values() -> None:
    """log(1 + e) alone loses all digits of e below 6e-8, and half of them at 1e-4."""
    x = torch.linspace(-80, 80, 100_001)
    want = torch.log1p((-x.double().abs()).exp()) + x.double().relu()
    assert float(((_softplus(x) - want).abs() / want).max()) < 4e-7
