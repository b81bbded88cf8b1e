"""Our models through timm's own interface: by name, from the folder of an export, and from the Hugging Face cache."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import pipeline.timm_models  # noqa: F401 (registers the models)
from pipeline.errors import ConfigError
from pipeline.exports.card import IMAGENET
from pipeline.exports.export import load_export
from pipeline.exports.transfer import transfer
from pipeline.models import build_from_config
from pipeline.models.timm_names import NAMES
from pipeline.streaming.transforms import eval_views
from tests.unit.exports.test_export import NARROW, exported, exported_family

timm = pytest.importorskip("timm")
TINY: dict[str, Any] = {"embed_dim": 16, "depth": 4}
OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "vim": ("vim_nano", {"image_size": (32, 40), **TINY}),
    "arm": ("vim_nano", {**TINY, "directions": 4, "pool": "mean", "mlp": "swiglu", "norm": "layer"}),
    "ssmixup": ("vim_nano", {**TINY, "ssmixup": {"nu": "learned"}}),
    "ablation": ("efficientvim_m1", {"image_size": 64, "mixer": "attention", "fusion": "map", **NARROW}),
    "efficientvim": ("efficientvim_nano_dist", {"image_size": 32, **NARROW}),
    "vssd": ("vssd_micro", {"image_size": 64, "depths": (1, 1, 1, 1), "width": 16}),
    "wide resnet": ("wrn_28_2", {"depth": 10}),
}


def of_timm(case: str, **more: Any) -> torch.nn.Module:
    name, fields = OURS[case]
    fields = {("img_size" if key == "image_size" else key): value for key, value in fields.items()}
    torch.manual_seed(0)
    return timm.create_model(
        "efficientvim_nano" if case == "ablation" else name, num_classes=3, **fields, **more
    ).eval()


def size_of(case: str) -> tuple[int, int]:
    size = OURS[case][1].get("image_size", 32)
    return (size, size) if isinstance(size, int) else size


def test_every_name_is_registered_and_none_of_timm_is_replaced() -> None:
    assert set(timm.list_models(module="timm_models")) == set(NAMES)
    assert type(timm.create_model("efficientvim_m1")).__module__.startswith("timm.")


@pytest.mark.parametrize("name", ["vim_small", "arm_base", "vssd_micro", "wrn_28_8"])
def test_a_name_is_our_model_to_the_parameter(name: str) -> None:
    with torch.device("meta"):
        theirs = timm.create_model(name)
        ours = build_from_config(NAMES[name].model_validate({"name": name}))
    shapes = [{k: v.shape for k, v in model.state_dict().items()} for model in (theirs, ours)]
    assert shapes[0] == shapes[1]
    assert theirs.pretrained_cfg["architecture"] == name
    assert theirs.pretrained_cfg["mean"] == IMAGENET.mean
    assert theirs.pretrained_cfg["std"] == IMAGENET.std
    assert theirs.pretrained_cfg["interpolation"] == "bicubic"


@pytest.mark.parametrize("case", OURS)
def test_an_export_is_a_model_of_timm(case: str, tmp_path: Path) -> None:
    name, fields = OURS[case]
    ours = exported_family(tmp_path / "export", name, 2.0, **fields)
    card = load_export(tmp_path / "export")[1]
    theirs = timm.create_model(f"local-dir:{tmp_path / 'export'}", pretrained=True).eval()
    images = torch.randn(3, 3, *size_of(case))
    with torch.no_grad():
        assert torch.equal(theirs(images), ours(images))
    assert theirs.pretrained_cfg["label_names"] == ["a", "b", "c"]
    size, how = card.model.image_size, card.preprocessing
    if size == (64, 64):  # theirs rounds 32 / 0.875 down, and does not crop a rectangle as ours does
        picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 100, 3), dtype=np.uint8))
        encoded = io.BytesIO()
        picture.save(encoded, format="png")
        view = timm.data.create_transform(**timm.data.resolve_model_data_config(theirs))(picture)
        wanted = eval_views(size, mean=how.mean, std=how.std, view=how.view)(encoded.getvalue(), 0)["images"]
        assert (view - wanted).abs().mean() < 0.01
    readme = (tmp_path / "export" / "README.md").read_text()
    assert "import pipeline.timm_models" in readme
    assert 'library_name: "pytorch"' in readme


@pytest.mark.parametrize("case", OURS)
def test_an_export_fits_other_classes_and_channels(case: str, tmp_path: Path) -> None:
    name, fields = OURS[case]
    ours = exported_family(tmp_path / "export", name, **fields)
    where = f"local-dir:{tmp_path / 'export'}"
    theirs = timm.create_model(where, pretrained=True, num_classes=7, in_chans=1).eval()
    grey = torch.randn(2, 1, *size_of(case))
    with torch.no_grad():
        assert theirs(grey).shape == (2, 7)
        # timm sums the three filters, so a grey image gives the features that it gives as three equal channels.
        found, wanted = (
            model.forward_head(model.forward_features(x), pre_logits=True)
            for model, x in ((theirs, grey), (ours, grey.expand(-1, 3, -1, -1)))
        )
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fields", [{}, {"cls_token": "first"}, {"cls_token": "none", "pool": "mean"}], ids=str)
def test_an_export_at_another_size_is_what_our_stages_start_from(fields: dict[str, str], tmp_path: Path) -> None:
    exported_family(tmp_path / "export", "vim_nano", image_size=(32, 40), **TINY, **fields)
    source, card = load_export(tmp_path / "export")
    ours = build_from_config(card.model.model_copy(update={"image_size": (48, 24)})).eval()
    transfer(source, ours, tmp_path)
    theirs = timm.create_model(f"local-dir:{tmp_path / 'export'}", pretrained=True, img_size=(48, 24)).eval()
    images = torch.randn(2, 3, 48, 24)
    with torch.no_grad():
        assert torch.equal(theirs(images), ours(images))


@pytest.mark.parametrize("case", OURS)
def test_what_users_of_timm_expect_of_a_model(case: str) -> None:
    model = of_timm(case)
    images = torch.randn(2, 3, *size_of(case))
    with torch.no_grad():
        features = model.forward_features(images)
        assert torch.equal(model.forward_head(features), model(images))
        assert model.forward_head(features, pre_logits=True).shape == (2, model.num_features)
        assert model.num_features == model.head_hidden_size
        model.reset_classifier(0)
        assert model(images).shape == (2, model.num_features)
        model.reset_classifier(5)
        assert model(images).shape == (2, 5)
    assert any(p is q for p in model.get_classifier().parameters() for q in model.parameters())
    groups = timm.models.group_parameters(model, model.group_matcher(), reverse=True)
    assert set(groups) == {name for name, _ in model.named_parameters()}
    assert model.get_submodule(model.default_cfg["first_conv"]).in_channels == 3


@pytest.mark.parametrize("case", OURS)
def test_features_only_gives_maps_as_it_describes_them(case: str) -> None:
    model = of_timm(case, features_only=True)
    images = torch.randn(2, 3, *size_of(case))
    with torch.no_grad():
        maps = model(images)
    height, width = size_of(case)
    described = zip(model.feature_info.channels(), model.feature_info.reduction(), strict=True)
    assert [m.shape for m in maps] == [(2, c, height // r, width // r) for c, r in described]
    assert len(maps) == (4 if case == "vssd" else 3)
    (last,) = of_timm(case, features_only=True, out_indices=(-1,))(images)
    torch.testing.assert_close(last, maps[-1], rtol=1e-4, atol=1e-5)


def test_the_hub_of_hugging_face_works_from_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = exported_family(tmp_path / "export", "vim_nano", **TINY)
    cached = tmp_path / "hub" / "models--someone--vim"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    (cached / "snapshots").mkdir()
    (tmp_path / "export").rename(cached / "snapshots" / ("0" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    theirs = timm.create_model("hf-hub:someone/vim", pretrained=True, cache_dir=tmp_path / "hub").eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(theirs(images), ours(images))
    assert theirs.pretrained_cfg["hf_hub_id"] == "someone/vim"


def test_timm_saves_a_model_of_ours_for_the_hub_and_loads_it(tmp_path: Path) -> None:
    model = of_timm("vim", drop_path_rate=0.1, global_pool="avg")
    arguments = {"img_size": (32, 40), "global_pool": "avg", **TINY}
    timm.models.save_for_hf(model, tmp_path / "saved", safe_serialization=True, model_args=arguments)
    again = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True).eval()
    images = torch.randn(2, 3, 32, 40)
    with torch.no_grad():
        assert torch.equal(again(images), model(images))


def test_a_wrong_argument_is_a_sentence() -> None:
    with pytest.raises(ConfigError, match="img_size here"):
        timm.create_model("vim_nano", image_size=32)
    with pytest.raises(ConfigError, match="embed_dim"):
        timm.create_model("vim_nano", embed_dims=32)


def test_a_pretrainer_has_no_config_for_timm(tmp_path: Path) -> None:
    exported(tmp_path / "export", "pretrainer")
    assert not (tmp_path / "export" / "config.json").exists()
