"""The hand-over: what goes out comes in, and what is damaged, missing or foreign is refused with a sentence."""

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from pipeline.errors import HandoverError
from pipeline.exports.card import Card, LabelsSeen, Lineage, Parent, Preprocessing, card_digest
from pipeline.exports.export import load_export, write_export
from pipeline.exports.hub import timm_config
from pipeline.exports.transfer import transfer
from pipeline.models import build_from_config, build_model
from pipeline.models.arm import ARM
from pipeline.models.config import DecoderConfig, VisionMambaConfig, family_of
from pipeline.models.variants import EFFICIENTVIM_VARIANTS
from pipeline.models.vision_mamba.position_embedding import resize_position_embedding, sincos_position_embedding
from pipeline.ops.torchvision_cpu import allow_torchvision
from pipeline.streaming.transforms import eval_views

TINY = {"name": "vim_nano", "embed_dim": 16, "depth": 2}
LABELLED = np.array([1, 4, 7])


def card(kind: str, **more) -> Card:
    return Card(
        kind=kind,
        model=VisionMambaConfig(**TINY, num_classes=3),
        decoder=DecoderConfig(width=16, depth=1, num_heads=2) if kind == "pretrainer" else None,
        classes=() if kind == "pretrainer" else ("a", "b", "c"),
        preprocessing=Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
        weights_sha256="",
        fingerprint_sha256="",
        lineage=Lineage(stage="distill", config_sha256="c", commit="d", dataset="data", split="s", parents=()),
        labels_seen=(LabelsSeen(split="s", protocol="a tenth", count=3, dataset="data"),),
        **more,
    )


def exported(folder: Path, kind: str = "classifier", classes: tuple[str, ...] = ("a", "b", "c")) -> torch.nn.Module:
    torch.manual_seed(1)
    c = card(kind)
    if kind == "classifier":
        config = VisionMambaConfig(**TINY, num_classes=len(classes))
        c = c.model_copy(update={"model": config, "classes": classes})
    model = ARM(c.model, c.decoder) if kind == "pretrainer" else build_model(**TINY, num_classes=len(classes))
    write_export(
        folder, card=c, weights=model.state_dict(), fingerprint_images=torch.randn(2, 3, 32, 32), labels={"s": LABELLED}
    )
    return model.eval()


@pytest.mark.parametrize("kind", ["classifier", "pretrainer"])
def test_a_model_comes_back_with_equal_weights_and_outputs(tmp_path: Path, kind: str) -> None:
    model = exported(tmp_path / "export", kind)
    loaded, read = load_export(tmp_path / "export")
    assert read.kind == kind
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(images), model(images))
    assert not list(tmp_path.glob(".*"))


def exported_family(folder: Path, name: str, temperature: float = 1.0, **fields: Any) -> torch.nn.Module:
    """A classifier of three classes with statistics that an evaluation must not ignore."""
    torch.manual_seed(1)
    config = family_of(name).model_validate({"name": name, "num_classes": 3, **fields})
    model = build_from_config(config)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    images = torch.randn(2, 3, *config.image_size)
    known = card("classifier").model_copy(update={"model": config, "temperature": temperature})
    write_export(folder, card=known, weights=model.state_dict(), fingerprint_images=images, labels={"s": LABELLED})
    return model.eval()


NARROW = {"widths": (16, 24, 32), "depths": (1, 2, 1), "states": (16, 9, 4)}
KNOWN_TO_TIMM = {
    "efficientvim_m1": {"image_size": 64, **NARROW},
    "efficientvim_m4_dist": {"image_size": (64, 96), **NARROW},
    "efficientvim_nano": {"image_size": 64, "stem_stride": 16, **NARROW},
    "timm/vit_tiny_patch16_224": {"image_size": 64, "options": {"depth": 2, "embed_dim": 48, "global_pool": "avg"}},
    "timm/mobilenetv3_small_050": {"image_size": 64},
}


@pytest.mark.parametrize("name", KNOWN_TO_TIMM)
def test_timm_builds_the_model_from_the_folder_with_equal_outputs_and_views(tmp_path: Path, name: str) -> None:
    allow_torchvision()
    import timm

    model = exported_family(tmp_path / "export", name, **KNOWN_TO_TIMM[name])
    height, width = model.image_size
    theirs = timm.create_model(f"local-dir:{tmp_path / 'export'}", pretrained=True).eval()
    images = torch.randn(2, 3, height, width)
    with torch.no_grad():
        want = model(images)
        torch.testing.assert_close(theirs(images), want, rtol=0, atol=1e-5)
        torch.testing.assert_close(load_export(tmp_path / "export")[0](images), want, rtol=0, atol=0)
        file = tmp_path / "export" / "model.safetensors"
        arguments = json.loads((tmp_path / "export" / "config.json").read_text())["model_args"] | {"num_classes": 3}
        bare = timm.create_model(theirs.pretrained_cfg["architecture"], checkpoint_path=file, **arguments).eval()
        assert torch.equal(bare(images), theirs(images))
    assert theirs.pretrained_cfg["label_names"] == ["a", "b", "c"]
    if height == width:  # theirs does not crop a rectangle as ours does
        picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 100, 3), dtype=np.uint8))
        encoded = io.BytesIO()
        picture.save(encoded, format="png")
        view = timm.data.create_transform(**timm.data.resolve_model_data_config(theirs))(picture)
        ours = eval_views(model.image_size, mean=(0.5,) * 3, std=(0.5,) * 3)(encoded.getvalue(), 0)["images"]
        assert (view - ours).abs().mean() < 0.01


@pytest.mark.parametrize(
    "name", [n for n in EFFICIENTVIM_VARIANTS if n.startswith("efficientvim_m") and "mini" not in n]
)
def test_timm_knows_every_published_efficientvim_by_our_values(name: str) -> None:
    allow_torchvision()
    import timm

    config = family_of(name).model_validate({"name": name, "num_classes": 3})
    known = timm_config(card("classifier").model_copy(update={"model": config}), torch.nn.Identity())
    assert known is not None
    assert known["architecture"] == name
    with torch.device("meta"):
        theirs, ours = timm.create_model(name, num_classes=3), build_from_config(config)
        again = timm.create_model(name, num_classes=3, **known["model_args"])
    shapes = [{k: v.shape for k, v in model.state_dict().items()} for model in (theirs, ours, again)]
    assert shapes[0] == shapes[1] == shapes[2]


@pytest.mark.parametrize("name", ["model.safetensors", "fingerprint.safetensors", "labels/s.npy", "model.json"])
@pytest.mark.parametrize("place", [0, 0.25, 0.5, 0.75, 0.99])
def test_a_flipped_byte_is_refused(tmp_path: Path, name: str, place: float) -> None:
    exported(tmp_path / "export")
    path = tmp_path / "export" / name
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 1
    path.write_bytes(data)
    with pytest.raises(HandoverError, match=f"{name} is (damaged|not a model card)"):
        load_export(tmp_path / "export")


def test_a_card_that_was_edited_is_refused(tmp_path: Path) -> None:
    """Labels seen cannot be taken out of the lineage by hand."""
    exported(tmp_path / "export")
    path = tmp_path / "export" / "model.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "labels_seen": []}))
    with pytest.raises(HandoverError, match="was edited"):
        load_export(tmp_path / "export")


def test_a_card_from_before_a_field_existed_keeps_its_hash(tmp_path: Path) -> None:
    """The hash is one of the file's values: fields that later versions add, at any depth, do not change it."""
    exported(tmp_path / "export")
    path = tmp_path / "export" / "model.json"
    values = json.loads(path.read_text())
    for newer in ("temperature", "calibration", "selected", "class_groups"):
        del values[newer]
    del values["model"]["drop_path"]
    path.write_text(json.dumps({**values, "card_sha256": card_digest(values)}))
    _, read = load_export(tmp_path / "export")
    assert read.temperature == 1.0
    assert read.selected is None
    path.write_text(json.dumps({**values, "temperature": 0.5}))
    with pytest.raises(HandoverError, match="was edited"):
        load_export(tmp_path / "export")


def test_the_hash_of_a_card_is_that_of_the_first_cards(tmp_path: Path) -> None:
    """Cards once hashed the dump of their schema, and left a white ground out; the same file must give the same hash."""
    exported(tmp_path / "export")
    values = json.loads((tmp_path / "export" / "model.json").read_text())
    sealed = values.pop("card_sha256")
    assert values["preprocessing"].pop("ground") == [255, 255, 255]
    for parent in values["lineage"]["parents"]:
        del parent["path"]
    assert hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest() == sealed


def test_where_a_parent_lay_is_information_and_its_hash_is_identity(tmp_path: Path) -> None:
    """A card keeps its seal when the path of a parent changes, and loses it when the hash of a parent changes."""
    parent = Parent(role="init_from", path="runs/a/export", weights_sha256="1" * 64)

    def with_parent(**changed: str) -> Card:
        c = card("classifier")
        parents = (parent.model_copy(update=changed),)
        return c.model_copy(update={"lineage": c.lineage.model_copy(update={"parents": parents})}).sealed()

    assert with_parent(path="moved/export").card_sha256 == with_parent().card_sha256
    assert with_parent(weights_sha256="2" * 64).card_sha256 != with_parent().card_sha256


@pytest.mark.parametrize("name", ["model.json", "model.safetensors", "fingerprint.safetensors"])
def test_an_incomplete_export_names_what_is_missing_and_how_to_make_it(tmp_path: Path, name: str) -> None:
    exported(tmp_path / "export")
    (tmp_path / "export" / name).unlink()
    with pytest.raises(HandoverError, match=f"{name} is missing; make it with: make stage-1"):
        Card.read(tmp_path / "export", remedy="make stage-1")


def test_code_that_computes_other_outputs_is_found_by_the_fingerprint_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported(tmp_path / "export")
    from pipeline.models.vision_mamba.model import VisionMamba

    monkeypatch.setattr(VisionMamba, "forward_head", lambda self, x, pre_logits=False: self.head(x[:, 0]))
    with pytest.raises(HandoverError, match="outputs for the fingerprint batch have a relative error"):
        load_export(tmp_path / "export")


def test_nothing_that_is_not_finite_is_written(tmp_path: Path) -> None:
    weights = build_model(**TINY, num_classes=3).state_dict()
    weights["head.bias"][0] = float("nan")
    with pytest.raises(HandoverError, match=r"head\.bias"):
        write_export(
            tmp_path / "export",
            card=card("classifier"),
            weights=weights,
            fingerprint_images=torch.zeros(1, 3, 32, 32),
            labels={},
        )
    assert not (tmp_path / "export").exists()


def test_other_classes_and_other_pixels_are_refused(tmp_path: Path) -> None:
    c = card("classifier")
    with pytest.raises(HandoverError, match=r"knows 3 classes \(a, b, c\), the dataset has 2"):
        c.check_classes(("a", "b"), tmp_path)
    with pytest.raises(HandoverError, match=r"set data\.mean, data\.std and data\.ground to the export's"):
        c.check_preprocessing(Preprocessing(mean=(0, 0, 0), std=(1, 1, 1)), tmp_path)


def test_labels_seen_must_be_among_those_claimed(tmp_path: Path) -> None:
    exported(tmp_path / "export")
    c, folder = Card.read(tmp_path / "export"), tmp_path / "export"
    assert c.check_labels(folder, {"data": 0}, np.array([0, 1, 4, 7]), allow_more=False) is False
    with pytest.raises(HandoverError, match="has seen labels outside this stage's 2: 3 of 'a tenth'"):
        c.check_labels(folder, {"data": 0}, np.array([1, 4]), allow_more=False)
    with pytest.raises(HandoverError, match="has seen labels outside"):
        c.check_labels(folder, {"other data": 0}, LABELLED, allow_more=False)
    assert c.check_labels(folder, {"data": 0}, np.array([1, 4]), allow_more=True) is True
    joint = {"all": 0, "before": 0, "data": 100}  # a dataset of several; its samples come after 100 others
    assert c.check_labels(folder, joint, np.array([3, 100, 101, 104, 107]), allow_more=False) is False
    with pytest.raises(HandoverError, match="has seen labels outside"):
        c.check_labels(folder, joint, np.array([0, 1, 4, 7]), allow_more=False)


@pytest.mark.parametrize("directions", [2, 4])
def test_a_pretrained_direction_starts_all_directions_and_nothing_else_is_new(tmp_path: Path, directions: int) -> None:
    source = exported(tmp_path / "export", "pretrainer")
    target = build_model(**TINY, num_classes=3, directions=directions)
    report = transfer(source, target, tmp_path)
    assert sorted(report.fresh) == ["cls_token", "head.bias", "head.weight", "norm_f.weight"]
    trained = source.backbone.layers[1].mixer
    for s in target.layers[1].mixer.suffixes:
        assert torch.equal(getattr(target.layers[1].mixer, f"A{s}_log"), trained.A_log)
        assert torch.equal(getattr(target.layers[1].mixer, f"dt_proj{s}").bias, trained.dt_proj.bias)
    assert torch.equal(target.pos_embed[:, target.cls_index], torch.zeros(1, 16))


def test_position_embeddings_of_another_grid_are_resized_around_the_cls_slot() -> None:
    target = build_model(**TINY, image_size=(48, 32))
    resized = resize_position_embedding(
        sincos_position_embedding((8, 8), 16), (8, 8), target.grid_size, target_cls=target.cls_index
    )
    assert resized.shape == target.pos_embed.shape
    assert resized[:, target.cls_index].abs().sum() == 0


def test_a_model_of_another_shape_is_refused_with_both_shapes(tmp_path: Path) -> None:
    source = exported(tmp_path / "export", "pretrainer")
    with pytest.raises(HandoverError, match=r"is \(.*\) there and \(.*\) here"):
        transfer(source, build_model("vim_nano", embed_dim=32, depth=2), tmp_path)
    with pytest.raises(HandoverError, match=r"layers\.2\..* is missing"):
        transfer(source, build_model("vim_nano", embed_dim=16, depth=3), tmp_path)
    with pytest.raises(HandoverError, match=r"layers\.1\..* has no place here"):
        transfer(source, build_model("vim_nano", embed_dim=16, depth=1), tmp_path)


@pytest.mark.parametrize("kind", ["classifier", "pretrainer"])
def test_an_export_tells_people_what_it_is(tmp_path: Path, kind: str) -> None:
    exported(tmp_path / "export", kind)
    _, header, text = (tmp_path / "export" / "README.md").read_text().split("---\n", 2)
    values = yaml.safe_load(header)
    assert values["tags"] == ["vim_nano", "distill", "safetensors"]
    assert values["pipeline_tag"] == ("image-classification" if kind == "classifier" else "image-feature-extraction")
    assert "3 (a tenth)" in text
    assert ("a, b, c" in text) == (kind == "classifier")
