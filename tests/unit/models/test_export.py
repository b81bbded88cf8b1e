"""The hand-over: what goes out comes in, and what is damaged, missing or foreign is refused with a sentence."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from pipeline.errors import HandoverError
from pipeline.models import build_model
from pipeline.models.arm import ARM
from pipeline.models.card import Card, LabelsSeen, Lineage, Preprocessing
from pipeline.models.config import DecoderConfig, VisionMambaConfig
from pipeline.models.export import load_export, transfer, write_export
from pipeline.models.vision_mamba import resize_positions, sincos_positions

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
        probe_sha256="",
        lineage=Lineage(stage="distill", config_sha256="c", commit="d", dataset="data", split="s", parents=()),
        labels_seen=(LabelsSeen(split="s", protocol="a tenth", count=3, dataset="data"),),
        **more,
    )


def exported(folder: Path, kind: str = "classifier") -> torch.nn.Module:
    torch.manual_seed(1)
    c = card(kind)
    model = ARM(c.model, c.decoder) if kind == "pretrainer" else build_model(**TINY, num_classes=3)
    write_export(
        folder, card=c, weights=model.state_dict(), probe_images=torch.randn(2, 3, 32, 32), labels={"s": LABELLED}
    )
    return model.eval()


@pytest.mark.parametrize("kind", ["classifier", "pretrainer"])
def test_a_model_comes_back_with_equal_weights_and_answers(tmp_path: Path, kind: str) -> None:
    model = exported(tmp_path / "export", kind)
    loaded, read = load_export(tmp_path / "export")
    assert read.kind == kind
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(images), model(images))
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("name", ["model.safetensors", "probe.safetensors", "labels/s.npy", "model.json"])
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


@pytest.mark.parametrize("name", ["model.json", "model.safetensors", "probe.safetensors"])
def test_an_incomplete_export_names_what_is_missing_and_how_to_make_it(tmp_path: Path, name: str) -> None:
    exported(tmp_path / "export")
    (tmp_path / "export" / name).unlink()
    with pytest.raises(HandoverError, match=f"{name} is missing; make it with: make stage-1"):
        Card.read(tmp_path / "export", remedy="make stage-1")


def test_other_code_that_answers_differently_is_found_by_the_probe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported(tmp_path / "export")
    from pipeline.models.vision_mamba import VisionMamba

    monkeypatch.setattr(VisionMamba, "forward_head", lambda self, x, pre_logits=False: self.head(x[:, 0]))
    with pytest.raises(HandoverError, match="answers its probe batch with a relative error"):
        load_export(tmp_path / "export")


def test_nothing_that_is_not_finite_is_written(tmp_path: Path) -> None:
    weights = build_model(**TINY, num_classes=3).state_dict()
    weights["head.bias"][0] = float("nan")
    with pytest.raises(HandoverError, match=r"head\.bias"):
        write_export(
            tmp_path / "export",
            card=card("classifier"),
            weights=weights,
            probe_images=torch.zeros(1, 3, 32, 32),
            labels={},
        )
    assert not (tmp_path / "export").exists()


def test_other_classes_and_other_pixels_are_refused(tmp_path: Path) -> None:
    c = card("classifier")
    with pytest.raises(HandoverError, match=r"knows 3 classes \(a, b, c\), the dataset has 2"):
        c.check_classes(("a", "b"), tmp_path)
    with pytest.raises(HandoverError, match=r"set data\.mean and data\.std alike"):
        c.check_preprocessing(Preprocessing(mean=(0, 0, 0), std=(1, 1, 1)), tmp_path)


def test_labels_seen_must_be_among_those_claimed(tmp_path: Path) -> None:
    exported(tmp_path / "export")
    c, folder = Card.read(tmp_path / "export"), tmp_path / "export"
    assert c.check_labels(folder, "data", np.array([0, 1, 4, 7]), allow_more=False) is False
    with pytest.raises(HandoverError, match="has seen labels outside this stage's 2: 3 of 'a tenth'"):
        c.check_labels(folder, "data", np.array([1, 4]), allow_more=False)
    with pytest.raises(HandoverError, match="has seen labels outside"):
        c.check_labels(folder, "other data", LABELLED, allow_more=False)
    assert c.check_labels(folder, "data", np.array([1, 4]), allow_more=True) is True


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
    assert torch.equal(target.pos_embed[:, target.middle], torch.zeros(1, 16))


def test_positions_of_another_grid_are_resized_around_the_cls_slot() -> None:
    target = build_model(**TINY, image_size=(48, 32))
    resized = resize_positions(sincos_positions((8, 8), 16), (8, 8), target)
    assert resized.shape == target.pos_embed.shape
    assert resized[:, target.middle].abs().sum() == 0


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
