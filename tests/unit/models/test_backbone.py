"""Frozen backbones and LoRA: what trains, what stays bit for bit, and what the merged model computes."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config import validate
from pipeline.errors import ConfigError
from pipeline.exports.transfer import transfer
from pipeline.models import build_model
from pipeline.models.backbone.adapt import adapt, copy_of
from pipeline.models.backbone.config import BackboneConfig
from pipeline.models.backbone.lora import LoRALinear, merged
from pipeline.train.config import OptimConfig
from pipeline.train.optim import parameter_groups

SIZE = (16, 16)
VIT = {"options": {"patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 2}}
EVA = {"options": {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}}
MODELS = {
    "vit": ("timm/vit_tiny_patch16_224", VIT),
    "dinov2_registers": ("timm/vit_small_patch14_reg4_dinov2", VIT),
    "dinov3": ("timm/vit_small_patch16_dinov3", EVA),
    "convnext": (
        "timm/convnext_tiny",
        {"options": {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}, "image_size": (32, 32)},
    ),
    "efficientvim": ("efficientvim_nano", {"image_size": (32, 32)}),
    "vssd": ("vssd_micro", {"image_size": (32, 32), "width": 16, "depths": (1, 1, 1, 1)}),
    "vision_mamba": ("vim_nano", {"embed_dim": 16, "depth": 2, "patch_size": 4}),
}


def built(family: str, **more) -> nn.Module:
    name, fields = MODELS[family]
    return build_model(name, **{"image_size": SIZE, "num_classes": 3, **fields, **more})


def config(**values) -> BackboneConfig:
    return validate(BackboneConfig, values, "backbone")


def train(model: nn.Module, steps: int = 3, drop: str = "") -> None:
    """Take AdamW steps on what trains, in training mode."""
    groups = parameter_groups(model, OptimConfig(lr=0.05))
    adamw = torch.optim.AdamW(groups, lr=0.05)
    model.train()
    for seed in range(steps):
        images = torch.randn(4, 3, *model.image_size, generator=torch.Generator().manual_seed(seed))
        F.cross_entropy(model(images), torch.tensor([0, 1, 2, 0])).backward()
        adamw.step()
        adamw.zero_grad()


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("kind", ["frozen", "lora"])
def test_what_does_not_train_is_bit_identical_after_training(family: str, kind: str) -> None:
    """Weights and running statistics; the classifier moves, and with LoRA the features too."""
    if family == "efficientvim" and kind == "lora":
        pytest.skip("it has no linear layer but its classifier: refused, see below")
    model = built(family, drop_path=0.1)
    before = copy.deepcopy(model.state_dict())
    adapt(model, config(train=kind), model.image_size)
    train(model)
    after, moved = model.state_dict(), {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(torch.equal(v, after[k]) for k, v in before.items() if k not in moved)
    assert any(not torch.equal(before[k], after[k]) for k in moved & before.keys())
    assert all(p.grad is None for n, p in model.named_parameters() if n not in moved)
    assert sum(p.numel() for g in parameter_groups(model, OptimConfig(lr=1)) for p in g["params"]) == sum(
        p.numel() for n, p in model.named_parameters() if n in moved
    )


@pytest.mark.parametrize("family", ["vit", "dinov2_registers", "dinov3", "convnext", "vssd", "vision_mamba"])
def test_merged_lora_equals_the_unmerged_forward(family: str) -> None:
    torch.manual_seed(0)
    model, plain = built(family), built(family).eval()
    start = copy.deepcopy(model).eval()
    adapt(model, config(train="lora", lora={"rank": 3, "alpha": 5}), model.image_size)
    images = torch.randn(2, 3, *model.image_size)
    assert torch.equal(model.eval()(images), start(images))  # B is zero at the start
    train(model)
    plain.load_state_dict(merged(model.state_dict(), model))
    with torch.no_grad():
        a, b = model.eval()(images), plain(images)
    assert (a - start(images)).abs().max() > 1e-3
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_a_low_rank_update_is_the_formula() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(7, 5).double()
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    updated = LoRALinear.of(layer, config(train="lora", lora={"rank": 2, "alpha": 6}).lora).double()
    updated.lora_b.data.normal_()
    x = torch.randn(4, 7, dtype=torch.float64)
    expected = x @ (weight + 6 / 2 * updated.lora_b @ updated.lora_a).T + bias
    torch.testing.assert_close(updated(x), expected, rtol=1e-12, atol=1e-12)


def test_every_linear_layer_of_the_backbone_is_updated_unless_targets_name_some() -> None:
    def updated(family: str, **lora) -> set[str]:
        model = adapt(built(family), config(train="lora", lora=lora), SIZE)
        return {n for n, m in model.named_modules() if isinstance(m, LoRALinear)}

    inside = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert updated("vit") == {f"model.blocks.{i}.{name}" for i in range(3) for name in inside}
    assert updated("vit", targets=["qkv", "1.mlp.fc1"]) == {
        *(f"model.blocks.{i}.attn.qkv" for i in range(3)),
        "model.blocks.1.mlp.fc1",
    }
    with pytest.raises(
        ConfigError, match="no linear layer of the backbone is called 'query'; it has fc1, fc2, proj, qkv"
    ):
        updated("vit", targets=["query"])
    with pytest.raises(ConfigError, match=r"this backbone has none; set backbone\.train=frozen or whole"):
        adapt(built("efficientvim"), config(train="lora"), (32, 32))


def test_a_layer_whose_weight_is_read_by_its_model_is_refused() -> None:
    """This DINOv3 has biases of q and v alone: its attention multiplies by `qkv.weight` itself, past an update."""
    model = build_model("timm/vit_small_patch16_dinov3_qkvb", image_size=SIZE, num_classes=3, **EVA)
    with pytest.raises(ConfigError, match=r"attn\.qkv is not called as a layer"):
        adapt(model, config(train="lora", lora={"targets": ["qkv"]}), SIZE)
    adapt(model, config(train="lora"), SIZE)
    assert not any(isinstance(m, LoRALinear) for n, m in model.named_modules() if n.endswith("qkv"))


def test_contradictions_are_refused_in_a_sentence() -> None:
    for values, sentence in (
        ({"train": "frozen", "lora": {}}, "backbone.lora is for train=lora, not frozen"),
        ({"train": "lora", "cached_views": 2}, "set backbone.train=frozen or cached_views=0"),
        ({"train": "frozen", "cache": "x"}, "set it to 1 or more"),
        ({"train": "half"}, "whole"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            config(**values)
    assert validate(BackboneConfig, config(train="lora").model_dump(mode="json"), "again") == config(train="lora")


def test_new_weights_train_beside_a_frozen_backbone() -> None:
    """A masked autoencoder's file has no norm behind the mean pool."""
    avg = {"options": VIT["options"] | {"global_pool": "avg"}}
    model = built("vit", **avg)
    new = ["model.fc_norm.weight", "model.fc_norm.bias", "model.head.weight", "model.head.bias"]
    adapt(model, config(train="frozen"), SIZE, new)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(new)
    with pytest.raises(ConfigError, match=r"fc_norm\.weight is new and would train; set cached_views=0"):
        adapt(built("vit", **avg), config(train="frozen", cached_views=1), SIZE, new)


def test_an_averages_copy_shares_the_frozen_weights_and_stays_in_eval_mode() -> None:
    model = adapt(built("vit", drop_path=0.5), config(train="frozen"), SIZE)
    model.train()
    shared, own = copy_of(model, share=True), copy_of(model, share=False)
    for copied, same in ((shared, True), (own, False)):
        pairs = [(p, copied.get_parameter(n)) for n, p in model.named_parameters()]
        assert all((a is b) == (same and not a.requires_grad) for a, b in pairs)
        copied.train()
        assert copied.training
        assert not any(m.training for m in copied.model.blocks.modules())
        images = torch.randn(2, 3, *SIZE)
        assert torch.equal(copied(images), model(images))  # drop path is off


def test_layers_join_from_the_top_and_lie_still_until_then() -> None:
    model = built("vit")
    groups = parameter_groups(model, OptimConfig(lr=1, unfreeze_every=10))
    joins = {id(p): g["joins"] for g in groups for p in g["params"]}
    found = {n: joins[id(p)] for n, p in model.named_parameters()}
    assert found["model.head.weight"] == 0
    assert found["model.blocks.2.mlp.fc1.weight"] == 10
    assert found["model.blocks.0.attn.qkv.weight"] == 30
    assert found["model.patch_embed.proj.weight"] == 40
    assert parameter_groups(model, OptimConfig(lr=1))[0]["joins"] == 0


@pytest.mark.parametrize("family", ["vit", "dinov3", "convnext"])
def test_recomputing_in_the_backward_changes_no_gradient_of_an_update(family: str) -> None:
    """A frozen embedding gives blocks an input without a gradient, at which a reentrant checkpoint would stop."""
    grads: list[list[Tensor]] = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = built(family)
        adapt(model, config(train="lora"), model.image_size)
        for name, p in model.named_parameters():
            if name.endswith("lora_b"):
                p.data.normal_()
        if recompute:
            model.set_grad_checkpointing()
        images = torch.randn(2, 3, *model.image_size, generator=torch.Generator().manual_seed(1))
        model.train()(images).square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_a_backbone_with_registers_starts_one_for_larger_images() -> None:
    """timm gives its class token no row of the position embedding."""
    source, target = built("dinov2_registers"), built("dinov2_registers", image_size=(24, 24))
    source.model.pos_embed.data.fill_(0.25)
    transfer(source, target, Path("here"))
    torch.testing.assert_close(target.model.pos_embed, torch.full((1, 36, 24), 0.25))
