"""Released weights in: no key is lost, outputs follow the equations, and nothing that could run is loaded."""

import os
import pickle
import sys
from collections import OrderedDict
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

from pipeline.classifier import load
from pipeline.config import validate
from pipeline.errors import HandoverError
from pipeline.evaluation_view import EvaluationView
from pipeline.exports.card import Card
from pipeline.exports.convert import convert
from pipeline.exports.export import load_export
from pipeline.exports.released import layout_of
from pipeline.exports.transfer import transfer
from pipeline.exports.weights import load_weights
from pipeline.models import build_model
from pipeline.models.__main__ import main
from tests.unit.exports import released
from tests.unit.models import oracle

SMALL = {
    "vim": released.vim(dim=32, depth=2, tokens=17, classes=5, patch=4),
    "arm_fine_tuned": released.arm_fine_tuned(dim=32, depth=2, tokens=17, classes=5, patch=4),
    "arm_pretraining": released.arm_pretraining(dim=32, depth=12, tokens=64, group=16, width=128, blocks=3, patch=4),
}


def saved(folder: Path, content: object) -> Path:
    torch.save(content, folder / "released.pth")
    return folder / "released.pth"


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("vim_tiny", released.vim(dim=192, depth=24, tokens=197, classes=1000)),
        ("vim_small", released.vim(dim=384, depth=24, tokens=197, classes=1000)),
        ("vim_base", released.vim(dim=768, depth=24, tokens=197, classes=1000)),
        ("arm_base", released.arm_fine_tuned(dim=768, depth=12, tokens=197, classes=1000)),
        ("arm_large", released.arm_fine_tuned(dim=1024, depth=24, tokens=197, classes=1000)),
        ("arm_huge", released.arm_fine_tuned(dim=1536, depth=24, tokens=197, classes=1000)),
    ],
)
def test_our_models_have_the_released_names_and_shapes(name: str, shapes: released.Shapes) -> None:
    with torch.device("meta"):
        model = build_model(name)
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == shapes


@pytest.mark.parametrize("layout", SMALL)
def test_a_released_file_becomes_an_export_without_a_key_lost(layout: str, tmp_path: Path) -> None:
    state = released.filled(SMALL[layout])
    card = convert(saved(tmp_path, released.checkpoint(state)), tmp_path / "export")
    model, read = load_export(tmp_path / "export")
    assert read == card
    images = torch.randn(2, 3, *card.model.image_size)
    double = {name: value.double() for name, value in state.items()}
    if layout == "arm_pretraining":
        assert card.labels_seen == ()
        assert (card.decoder.num_heads, card.decoder.depth, card.model.cluster_size) == (2, 3, 16)
        back = released.under_released_names(model)
        expected = oracle.predict(double, images.double(), side=4, group=16, heads=2, taps=(6, 8, 10, 12))
        back["mask"] = state["mask"]
    else:
        assert [(seen.dataset, seen.count) for seen in card.labels_seen] == [(None, 0)]
        back = model.state_dict()
        expected = oracle.classify(double, images.double(), pool=card.model.pool)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    torch.testing.assert_close(model(images).double(), expected, rtol=1e-5, atol=1e-5)


def test_a_released_efficientvim_is_read_with_its_norms_and_its_settings(tmp_path: Path) -> None:
    """The shapes tell the variant; norms are (1, D, 1) there; the settings are an object of a package nobody needs here."""
    config = {"widths": (16, 24, 32), "depths": (1, 2, 1), "states": (9, 4, 4), "num_classes": 5}
    source = build_model("efficientvim_m2", **config, image_size=64).eval()
    state = source.state_dict()
    state |= {k: v[None, :, None] for k, v in state.items() if k.endswith(("blocks.0.norm.weight", "norm.2.bias"))}
    package, settings = ModuleType("yacs"), ModuleType("yacs.config")
    settings.CfgNode = type("CfgNode", (dict,), {"__module__": "yacs.config"})  # type: ignore[attr-defined]
    sys.modules |= {"yacs": package, "yacs.config": settings}
    try:
        node = settings.CfgNode(MODEL=settings.CfgNode(NAME="EfficientViM_M2"))
        path = saved(tmp_path, {"model": {}, "model_ema": state, "config": node, "max_accuray_ema": 75.0})
    finally:
        del sys.modules["yacs"], sys.modules["yacs.config"]
    card = convert(path, tmp_path / "export", image_size=(64, 64))
    model, _ = load_export(tmp_path / "export")
    assert {name: getattr(card.model, name) for name in config} == config
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(model(images), source(images))


@pytest.mark.parametrize("name", ["efficientvim_m1", "efficientvim_m4_dist"])
def test_the_shapes_of_an_efficientvim_tell_its_variant(name: str) -> None:
    with torch.device("meta"):
        model = build_model(name, num_classes=7)
    config, _ = layout_of(model.state_dict()).describe(model.state_dict(), None)
    assert config == validate(type(config), {"name": name, "num_classes": 7}, "")


@pytest.mark.parametrize("size", [(24, 16), (8, 32)], ids=["more patches", "as many in another shape"])
def test_a_released_vim_starts_a_model_of_other_classes_and_another_size(tmp_path: Path, size) -> None:
    """As `weights` of stage 2 does: only the head is new, and cls keeps its place in the middle."""
    state = released.filled(SMALL["vim"])
    path = saved(tmp_path, released.checkpoint(state))
    target = build_model("vim_tiny", embed_dim=32, depth=2, image_size=size, patch_size=4, num_classes=3)
    report = load_weights(target, path)
    assert sorted(report.fresh) == sorted(report.dropped) == ["head.bias", "head.weight"]
    assert torch.equal(target.pos_embed[0, target.cls_index], state["pos_embed"][0, 8])
    grid = state["pos_embed"][:, [i for i in range(17) if i != 8]].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    resized = F.interpolate(grid, size=target.grid_size, mode="bicubic").flatten(2).transpose(1, 2)
    own = [i for i in range(target.num_patches + 1) if i != target.cls_index]
    torch.testing.assert_close(target.pos_embed[:, own], resized)
    with pytest.raises(HandoverError, match="does not fit this model"):
        load_weights(target, saved(tmp_path, released.filled(SMALL["arm_pretraining"])))


def test_rows_of_the_projection_are_interleaved_over_the_decoders_blocks(tmp_path: Path) -> None:
    """Block j reads channels j, j + depth, ...: other rows do not reach it."""
    state = released.filled(SMALL["arm_pretraining"])
    convert(saved(tmp_path, released.checkpoint(state)), tmp_path / "export")
    arm, _ = load_export(tmp_path / "export")
    heard: dict[int, torch.Tensor] = {}
    for j, block in enumerate(arm.blocks):
        block.register_forward_pre_hook(lambda _, inputs, j=j: heard.update({j: inputs[1]}))
    images = torch.randn(1, 3, 32, 32)
    arm(images)
    before = dict(heard)
    with torch.no_grad():
        arm.to_decoder.bias[1::3] += 1
    arm(images)
    assert [torch.equal(heard[j], before[j]) for j in range(3)] == [True, False, True]


def test_a_converted_pretrainer_starts_fine_tuning(tmp_path: Path) -> None:
    state = released.filled(SMALL["arm_pretraining"])
    convert(saved(tmp_path, released.checkpoint(state)), tmp_path / "export")
    source, card = load_export(tmp_path / "export")
    size = {"image_size": 40, "patch_size": 4, "num_classes": 3}
    target = build_model("arm_base", embed_dim=32, depth=12, **size)
    report = transfer(source, target, tmp_path)
    assert sorted(report.fresh) == ["cls_token", "head.bias", "head.weight", "norm_f.bias", "norm_f.weight"]
    assert torch.equal(target.layers[11].mixer.A_c_b_log, state["layers.11.mixer.A_log"])
    assert card.kind == "pretrainer"


def test_other_forms_of_a_file_are_read(tmp_path: Path) -> None:
    """Weights alone, wrapped names, half precision, the averaged weights, safetensors, torch's format before zip."""
    state = released.filled(SMALL["vim"])
    half = {f"module.{k}": v.bfloat16() for k, v in state.items()}
    double = {k: v + 1 for k, v in state.items()}
    content = {"model": OrderedDict(half), "model_ema": double, "lr_scheduler": {"_step": 3}, "scaler": {}}
    path = saved(tmp_path, content)
    convert(path, tmp_path / "half", entry="model")
    convert(path, tmp_path / "ema")
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    convert(tmp_path / "old.pth", tmp_path / "plain")
    save_file(state, tmp_path / "plain.safetensors")
    convert(tmp_path / "plain.safetensors", tmp_path / "safe")
    first = {name: load_file(tmp_path / name / "model.safetensors") for name in ("half", "ema", "plain", "safe")}
    assert torch.equal(first["half"]["head.weight"], state["head.weight"].bfloat16().float())
    assert torch.equal(first["ema"]["head.weight"], state["head.weight"] + 1)
    assert torch.equal(first["plain"]["head.weight"], state["head.weight"])
    assert torch.equal(first["safe"]["head.weight"], state["head.weight"])


@pytest.mark.parametrize(
    ("tokens", "given", "size", "stride"),
    [(17, None, (16, 16), None), (10, (8, 8), (8, 8), 2), (13, (8, 24), (8, 24), None), (10, (12, 12), (12, 12), None)],
)
def test_the_geometry_follows_from_the_tokens_and_the_image_size(tokens, given, size, stride, tmp_path) -> None:
    state = released.filled(released.vim(dim=16, depth=1, tokens=tokens, classes=2, patch=4))
    model = convert(saved(tmp_path, state), tmp_path / "export", image_size=given).model
    assert (model.image_size, model.stride) == (size, stride)


def test_patches_that_may_overlap_by_half_are_asked_about(tmp_path: Path) -> None:
    """Vim's fine-grained models: 27 x 27 patches are 432 px side by side, or 224 px at a stride of 8."""
    state = released.filled(released.vim(dim=16, depth=1, tokens=730, classes=2, patch=16))
    path = saved(tmp_path, state)
    with pytest.raises(HandoverError, match="--image-size 432 or --image-size 224"):
        convert(path, tmp_path / "export")
    assert convert(path, tmp_path / "export", image_size=(224, 224)).model.stride == 8


class Hostile:
    """Unpickled as usual, it would run a command."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("where", ["args", "model", "plain pickle", "old format"])
def test_a_file_that_would_run_code_is_refused_and_runs_nothing(where: str, tmp_path: Path, capsys) -> None:
    content = released.checkpoint(released.filled(SMALL["vim"]))
    marker, path = tmp_path / "ran", tmp_path / "hostile.pth"
    if where == "model":
        content["model"]["head.bias"] = Hostile(marker)
    else:
        content["args"] = Hostile(marker)
    if where == "plain pickle":
        path.write_bytes(pickle.dumps({"args": Hostile(marker)}, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=where != "old format")
    assert main(["convert", str(path), "--out", str(tmp_path / "export")]) == 4
    said = capsys.readouterr().err
    assert f"is not read: it holds {os.name}.system, and anything but tensors" in said
    assert "Traceback" not in said
    assert not marker.exists()
    assert not (tmp_path / "export").exists()


def test_a_class_outside_the_allow_list_is_named(tmp_path: Path) -> None:
    content = released.checkpoint(released.filled(SMALL["vim"])) | {"path": tmp_path}
    with pytest.raises(HandoverError, match=r"PosixPath, and anything but tensors, plain containers and argparse\.N"):
        convert(saved(tmp_path, content), tmp_path / "export")


@pytest.mark.parametrize("cut", [0, 10, 1000, -20])
def test_a_damaged_file_is_refused(cut: int, tmp_path: Path) -> None:
    path = saved(tmp_path, released.checkpoint(released.filled(SMALL["vim"])))
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(HandoverError, match=r"is no torch checkpoint, or damaged|is not read"):
        convert(path, tmp_path / "export")
    (tmp_path / "damaged.safetensors").write_bytes(b"x" * 40)
    with pytest.raises(HandoverError, match="is no safetensors file, or damaged"):
        convert(tmp_path / "damaged.safetensors", tmp_path / "export")


def test_every_key_that_does_not_fit_is_named(tmp_path: Path) -> None:
    def refusal(change: dict[str, torch.Tensor | None], layout: str = "vim", **options) -> str:
        state = {k: v for k, v in (released.filled(SMALL[layout]) | change).items() if v is not None}
        with pytest.raises(HandoverError) as error:
            convert(saved(tmp_path, state), tmp_path / "export", **options)
        return str(error.value)

    said = refusal(
        {"rope.freqs": torch.ones(3), "layers.0.mixer.gamma": torch.ones(3), "layers.1.mixer.gamma": torch.ones(3)}
    )
    assert said.endswith("no place for layers.*.mixer.gamma, rope.freqs")
    assert refusal({"norm_f.weight": None}).endswith("norm_f.weight missing")
    assert "head.bias is (4,), not (5,)" in refusal({"head.bias": torch.zeros(4)})
    assert "head.bias holds torch.int64" in refusal({"head.bias": torch.zeros(5, dtype=torch.int64)})
    assert "lacks patch_embed.proj.weight" in refusal({"patch_embed.proj.weight": None})
    assert "its 17 patches do not lie in a square" in refusal({"pos_embed": torch.zeros(1, 18, 32)})
    assert "no stride cuts (16, 24) pixels into its 16 patches" in refusal({}, image_size=(16, 24))
    assert "claims more values than the file holds" in refusal(
        {"pos_embed": torch.zeros(1, 1, 32).expand(1, 10**6 + 1, 32)}
    )
    open_mask = torch.zeros(SMALL["arm_pretraining"]["mask"])
    assert "mask is not what our model computes" in refusal({"mask": open_mask}, "arm_pretraining")
    assert "is not written: 1 tensors hold NaN" in refusal({"head.bias": torch.full((5,), torch.nan)})
    assert (
        "belong to no known layout; known layouts, with the key of each: ARM, pretraining (enc2dec.weight)"
        in refusal({k: None for k in SMALL["vim"] if "A_b_log" in k})
    )
    assert not (tmp_path / "export").exists()


def test_the_command_says_what_it_did_and_what_is_wrong(tmp_path: Path, capsys) -> None:
    path = saved(tmp_path, released.checkpoint(released.filled(SMALL["vim"])))
    names = tmp_path / "classes.txt"
    names.write_text("\n".join("abcde"))
    done = ["convert", str(path), "--out", str(tmp_path / "export"), "--classes", str(names)]
    assert main(done) == 0
    assert "classifier; use it with pipeline.load(" in capsys.readouterr().out
    assert Card.read(tmp_path / "export").classes == tuple("abcde")
    assert main(done) == 2
    assert "exists; give --out a folder that does not" in capsys.readouterr().err
    other = ["--out", str(tmp_path / "other")]
    assert main(["convert", str(tmp_path / "absent.pth"), *other]) == 4
    assert main(["convert", str(path), *other, "--entry", "weights"]) == 4
    assert "has no weights under 'weights'; it holds: model, optimizer, epoch, args" in capsys.readouterr().err
    names.write_text("a\nb")
    assert main(["convert", str(path), *other, "--classes", str(names)]) == 2
    assert "2 class names for the 5 classes" in capsys.readouterr().err


def test_a_converted_arm_is_judged_with_the_published_preprocessing(tmp_path: Path) -> None:
    """Its evaluation squashes to 8/7 of the view's side; Vim's keeps the shape. Above 224 pixels ARM cuts nothing off."""
    state = released.filled(SMALL["arm_fine_tuned"])
    card = convert(saved(tmp_path, released.checkpoint(state)), tmp_path / "arm")
    assert card.preprocessing.view == EvaluationView(resize="squash", crop=0.875)
    pixels = np.random.default_rng(0).integers(0, 255, (40, 90, 3), dtype=np.uint8)
    side = card.model.image_size[0]
    edge = (whole := round(side / 0.875)) - side
    squashed = Image.fromarray(pixels).resize((whole, whole), Image.Resampling.BICUBIC)
    want = np.asarray(squashed.crop((edge // 2, edge // 2, edge // 2 + side, edge // 2 + side))).astype(float)
    seen = load(tmp_path / "arm")._view.pixels(pixels, 0)["images"]
    assert np.abs(seen.permute(1, 2, 0).numpy() - want).mean() < 1
    view = layout_of(state).view
    assert view((384, 384)) == EvaluationView(resize="squash", crop=1.0)
    other = convert(saved(tmp_path, released.filled(SMALL["vim"])), tmp_path / "vim")
    assert other.preprocessing.view == EvaluationView()
    assert Card.read(tmp_path / "arm").preprocessing == card.preprocessing
