"""What every family promises: it is chosen by name, builds on the meta device, trains, and its weights move as declared."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pipeline.config import validate
from pipeline.errors import ConfigError, HandoverError
from pipeline.exports.card import Card, LabelsSeen, Lineage, Preprocessing
from pipeline.exports.export import load_export, write_export
from pipeline.exports.transfer import transfer
from pipeline.exports.weights import load_weights, read_weights
from pipeline.models import MODELS, build_from_config, build_model
from pipeline.models.config import (
    EfficientViMConfig,
    TimmConfig,
    VisionMambaConfig,
    VSSDConfig,
    WideResNetConfig,
    family_of,
)
from pipeline.models.layers import init_classifier
from pipeline.train.config import OptimConfig
from pipeline.train.optim import parameter_groups
from stages.configs.distill import DistillConfig

# One small model a family: (name, fields), for images of 32 x 48.
SMALL = {
    "vision_mamba": ("vim_nano", {"embed_dim": 16, "depth": 2}),
    "efficientvim": ("efficientvim_nano", {}),
    "vssd": ("vssd_micro", {"width": 16, "depths": (1, 1, 1, 1)}),
    "wide_resnet": ("wrn_28_2", {"depth": 10}),
    "timm_vit": ("timm/vit_tiny_patch16_224", {"options": {"depth": 2, "embed_dim": 48}}),
    "timm_resnet": ("timm/resnet18", {}),
}
SIZE = (32, 48)


def small(family: str, **more) -> torch.nn.Module:
    name, fields = SMALL[family]
    return build_model(name, **{"image_size": SIZE, "num_classes": 3, **fields, **more})


@pytest.mark.parametrize("family", SMALL)
def test_a_classifier_is_drawn_with_the_asked_standard_deviation(family: str) -> None:
    model = small(family, num_classes=200)
    rest = {k: v.clone() for k, v in model.state_dict().items()}
    init_classifier(model.get_classifier(), std=2e-5)
    weights = [m.weight for m in model.get_classifier().modules() if isinstance(m, torch.nn.Linear)]
    assert weights
    for weight in weights:
        assert weight.std().item() == pytest.approx(2e-5, rel=0.05)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, rest[k])}
    assert sum(k.endswith("weight") for k in changed) == len(weights)  # nothing but the classifier


@pytest.mark.parametrize("name", MODELS)
def test_every_name_builds_on_the_meta_device(name: str) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in build_model(name).parameters()) > 0


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("vim_nano", VisionMambaConfig),
        ("efficientvim_m1", EfficientViMConfig),
        ("vssd_tiny", VSSDConfig),
        ("wrn_28_2", WideResNetConfig),
        ("timm/vit_small_patch16_224", TimmConfig),
    ],
)
def test_a_config_is_chosen_by_its_name_and_survives_json(name: str, family: type) -> None:
    whole = {
        "run": {"experiment": "x"},
        "data": {"train": "d"},
        "optim": {"lr": 1},
        "loop": {"steps": 9, "global_batch": 8},
    }
    config = validate(DistillConfig, {**whole, "model": {"name": name}}, "here")
    assert type(config.model) is family
    again = DistillConfig.model_validate_json(config.model_dump_json())
    assert again.model == config.model


def test_a_refused_model_names_the_nearest_models_or_keys() -> None:
    whole = {
        "run": {"experiment": "x"},
        "data": {"train": "d"},
        "optim": {"lr": 1},
        "loop": {"steps": 9, "global_batch": 8},
    }
    for model, sentence in (
        ({"name": "efficientvim_m5"}, r"model: model name 'efficientvim_m5' is unknown; known: efficientvim_m\d"),
        ({"name": "efficientvim_m1", "width": 3}, r"model.width: unknown key; did you mean 'widths'"),
        ({"name": "vssd_tiny", "widths": 3}, r"model.widths: unknown key; did you mean 'width'"),
        ({"embed_dim": 3}, "model: name is missing"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            validate(DistillConfig, {**whole, "model": model}, "here")
    with pytest.raises(ConfigError, match="timm has no model 'resnet19'"):
        build_model("timm/resnet19")
    with pytest.raises(ConfigError, match="has no option 'stem_typ'; near ones: stem_type"):
        build_model("timm/resnet18", options={"stem_typ": "deep"})
    with pytest.raises(ConfigError, match="above 512 blocks"):
        build_model("timm/resnet18", options={"layers": [500, 10, 10, 10]})
    with pytest.raises(ValueError, match="is unknown"):
        family_of("resnet18")


@pytest.mark.parametrize(
    ("name", "options", "maps"),
    [
        ("timm/resnet18", {"output_stride": 8}, (512, 4, 4)),
        ("timm/resnet18", {"layers": [1, 1, 1, 1], "channels": [8, 16, 24, 32]}, (32, 1, 1)),
        ("timm/convnext_atto", {"output_stride": 8}, (320, 4, 4)),
    ],
)
def test_options_fit_a_convolutional_model_to_small_images(name: str, options: dict, maps: tuple[int, ...]) -> None:
    model = build_model(name, image_size=(32, 32), num_classes=3, options=options)
    assert model.forward_features(torch.zeros(2, 3, 32, 32)).shape == (2, *maps)


@pytest.mark.parametrize("family", SMALL)
def test_every_family_trains(family: str) -> None:
    """Gradients everywhere, layers that rise from the input, groups for the optimizer, timm's verbs."""
    model = small(family, drop_path=0.1)
    images = torch.randn(2, 3, *SIZE)
    assert model(images).shape == (2, 3)
    model(images).square().sum().backward()
    silent = [
        n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.isfinite().all())
    ]
    assert silent == []
    layers = [model.layer_of(name) for name, _ in model.named_parameters()]
    assert min(layers) == 0
    assert len(set(layers)) > 2
    groups = parameter_groups(model, OptimConfig(lr=1, layer_decay=0.5))
    assert sum(p.numel() for g in groups for p in g["params"]) == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )
    features = model.forward_features(images)
    assert torch.equal(model.eval().forward_head(model.forward_features(images)), model(images))
    assert model.forward_head(features, pre_logits=True).shape == (2, model.num_features)
    model.reset_classifier(7)
    assert model(images).shape == (2, 7)


@pytest.mark.parametrize("family", sorted(set(SMALL) - {"vision_mamba"}))
def test_recomputing_in_the_backward_changes_no_gradient_and_no_statistic(family: str) -> None:
    images = torch.randn(2, 3, *SIZE)
    torch.manual_seed(0)
    plain = small(family)
    torch.manual_seed(0)
    recomputed = small(family)
    recomputed.set_grad_checkpointing()
    for model in (plain, recomputed):
        model(images).square().sum().backward()
    for a, b in zip(plain.parameters(), recomputed.parameters(), strict=True):
        if a.requires_grad:
            torch.testing.assert_close(a.grad, b.grad)
    for (name, x), y in zip(plain.named_buffers(), recomputed.buffers(), strict=True):
        assert torch.equal(x, y), name
    norms = [[m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)] for model in (plain, recomputed)]
    assert all(a.momentum == b.momentum for a, b in zip(*norms, strict=True))


@pytest.mark.parametrize("family", SMALL)
def test_every_family_can_be_exported_and_loaded(family: str, tmp_path: Path) -> None:
    name, fields = SMALL[family]
    config = validate(family_of(name), {"name": name, "image_size": SIZE, "num_classes": 3, **fields}, "here")
    model = build_from_config(config)
    model(torch.randn(4, 3, *SIZE))  # batch norms count
    card = Card(
        kind="classifier",
        model=config,
        classes=("a", "b", "c"),
        preprocessing=Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
        weights_sha256="",
        fingerprint_sha256="",
        lineage=Lineage(stage="distill", config_sha256="c", commit="d", dataset="data", split="s", parents=()),
        labels_seen=(LabelsSeen(split="s", protocol="a tenth", count=3, dataset="data"),),
    )
    images = torch.randn(2, 3, *SIZE)
    write_export(
        tmp_path / "export",
        card=card,
        weights=model.state_dict(),
        fingerprint_images=images,
        labels={"s": np.array([1])},
    )
    loaded, read = load_export(tmp_path / "export")
    assert read.model == config
    assert torch.equal(loaded(images), model.eval()(images))


@pytest.mark.parametrize("family", SMALL)
def test_a_classifier_starts_one_for_larger_images(family: str, tmp_path: Path) -> None:
    """Models without a position embedding give equal logits; an embedding is resized, and a constant one stays constant."""
    source, target = small(family).eval(), small(family, image_size=(64, 96)).eval()
    embedding = next((p for n, p in source.named_parameters() if n.endswith("pos_embed")), None)
    if embedding is not None:
        embedding.data.fill_(0.25)
    report = transfer(source, target, tmp_path)
    assert report.fresh == report.dropped == []
    if embedding is None:
        images = torch.randn(2, 3, *SIZE)
        assert torch.equal(source(images), target(images))
    else:
        stretched = next(p for n, p in target.named_parameters() if n.endswith("pos_embed"))
        assert stretched.shape != embedding.shape
        torch.testing.assert_close(stretched, torch.full_like(stretched, 0.25))


def test_a_kind_of_model_does_not_start_another(tmp_path: Path) -> None:
    with pytest.raises(HandoverError, match="does not fit this model"):
        transfer(small("efficientvim"), small("vssd"), tmp_path)


class TestForeignWeights:
    def test_a_masked_autoencoder_starts_a_vit_of_another_size(self, tmp_path: Path) -> None:
        """MAE's file: an encoder for 64 x 64 with `norm`, a decoder, no classifier; fine-tuning pools by the mean."""
        encoder = build_model(
            "timm/vit_tiny_patch16_224", image_size=64, num_classes=0, options={"depth": 2, "embed_dim": 48}
        ).model.state_dict()
        extra = {"mask_token": torch.zeros(1, 1, 48), "decoder_embed.weight": torch.zeros(3, 3)}
        torch.save({"model": encoder | extra}, tmp_path / "mae.pth")
        model = small("timm_vit", options={"depth": 2, "embed_dim": 48, "global_pool": "avg"})
        report = load_weights(model, tmp_path / "mae.pth")
        assert set(report.fresh) == {
            "model.fc_norm.weight",
            "model.fc_norm.bias",
            "model.head.weight",
            "model.head.bias",
        }
        assert torch.equal(model.model.blocks[1].mlp.fc1.weight, encoder["blocks.1.mlp.fc1.weight"])

    def test_a_released_classifier_keeps_all_but_its_head(self, tmp_path: Path) -> None:
        thousand = build_model("timm/resnet18")
        save_file(thousand.model.state_dict(), tmp_path / "resnet.safetensors")
        report = load_weights(small("timm_resnet"), tmp_path / "resnet.safetensors")
        assert sorted(report.fresh) == ["model.fc.bias", "model.fc.weight"]
        whole = load_weights(build_model("timm/resnet18"), tmp_path / "resnet.safetensors")
        assert whole.fresh == whole.dropped == []

    def test_a_released_efficientvim_has_norms_of_another_shape(self, tmp_path: Path) -> None:
        source = small("efficientvim").eval()
        released = {
            k: v[None, :, None]
            if ".norm." in k and "stages" in k and v.dim() == 1 and "blocks" in k and "conv" not in k and "ffn" not in k
            else v
            for k, v in source.state_dict().items()
        }
        torch.save({"model": {}, "model_ema": released}, tmp_path / "m.pth")
        target = small("efficientvim").eval()
        assert load_weights(target, tmp_path / "m.pth").fresh == []
        images = torch.randn(2, 3, *SIZE)
        assert torch.equal(source(images), target(images))

    def test_what_cannot_be_read_or_does_not_fit_is_refused_in_a_sentence(self, tmp_path: Path) -> None:
        with pytest.raises(HandoverError, match="nothing is downloaded"):
            read_weights(tmp_path / "none.pth")
        (tmp_path / "garbage.pth").write_bytes(b"no weights")
        (tmp_path / "garbage.safetensors").write_bytes(b"no weights")
        torch.save({"model": torch.nn.Linear(2, 2)}, tmp_path / "pickled.pth")
        for name, refusal in (
            ("garbage.pth", "damaged|not read"),
            ("garbage.safetensors", "damaged"),
            ("pickled.pth", "not read"),
        ):
            with pytest.raises(HandoverError, match=refusal):
                read_weights(tmp_path / name)
        save_file(small("efficientvim").state_dict(), tmp_path / "other.safetensors")
        with pytest.raises(HandoverError, match="does not fit this model"):
            load_weights(small("timm_resnet"), tmp_path / "other.safetensors")
