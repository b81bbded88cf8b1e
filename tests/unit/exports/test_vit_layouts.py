"""Public layouts of Vision Transformers: a model's weights, written in each layout's names, load to the same model.

The names are those of the released files; each table below maps timm's name of a tensor to them.
"""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.errors import HandoverError
from pipeline.exports.weights import load_weights
from pipeline.models import build_model

WIDTH, DEPTH = 24, 2
OPTIONS = {"patch_size": 7, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": 2}
Weights = dict[str, Tensor]


def built(name: str, size: int = 28, classes: int = 3, **options) -> nn.Module:
    model = build_model(f"timm/{name}", image_size=size, num_classes=classes, options={**OPTIONS, **options}).eval()
    for p in model.parameters():
        p.data.normal_(0, 0.3)
    return model


def source(name: str, **options) -> Weights:
    """The weights of a backbone without its classifier, by timm's names."""
    weights = built(name, **options).model.state_dict()
    return {k: v.clone() for k, v in weights.items() if not k.startswith("head.")}


def split(weights: Weights, names: str) -> Weights:
    """Cut every qkv into three, named by a pattern such as `attn.{}_proj`."""
    result = {}
    for key, value in weights.items():
        if ".attn.qkv." in key:
            for part, words in zip(value.chunk(3), names.split(), strict=True):
                result[key.replace("attn.qkv", words)] = part
        else:
            result[key] = value
    return result


def renamed(weights: Weights, *pairs: tuple[str, str]) -> Weights:
    for pattern, name in pairs:
        weights = {re.sub(pattern, name, key): value for key, value in weights.items()}
    return weights


def hugging_face_vit(w: Weights) -> Weights:
    w = split(w, "attention.attention.query attention.attention.key attention.attention.value")
    w = renamed(
        w,
        (r"^blocks\.", "encoder.layer."),
        (r"attn\.proj", "attention.output.dense"),
        (r"mlp\.fc1", "intermediate.dense"),
        (r"mlp\.fc2", "output.dense"),
        (r"norm1", "layernorm_before"),
        (r"norm2", "layernorm_after"),
        (r"^norm\.", "layernorm."),
        (r"^(cls_token)", r"embeddings.\1"),
        (r"^pos_embed", "embeddings.position_embeddings"),
        (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"),
        (r"^", "vit."),
    )
    return w | {"vit.pooler.dense.weight": torch.zeros(WIDTH, WIDTH), "classifier.weight": torch.zeros(1000, WIDTH)}


def hugging_face_dinov2(w: Weights) -> Weights:
    w = split(w, "attention.attention.query attention.attention.key attention.attention.value")
    w = renamed(
        w,
        (r"^blocks\.", "encoder.layer."),
        (r"attn\.proj", "attention.output.dense"),
        (r"ls([12])\.gamma", r"layer_scale\1.lambda1"),
        (r"^norm\.", "layernorm."),
        (r"^(cls_token)", r"embeddings.\1"),
        (r"^pos_embed", "embeddings.position_embeddings"),
        (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"),
    )
    return w | {"embeddings.mask_token": torch.zeros(1, WIDTH)}


def hugging_face_clip(w: Weights) -> Weights:
    w = renamed(
        split(w, "self_attn.q_proj self_attn.k_proj self_attn.v_proj"),
        (r"^blocks\.", "encoder.layers."),
        (r"attn\.proj", "self_attn.out_proj"),
        (r"norm([12])\.", r"layer_norm\1."),
        (r"^norm_pre\.", "pre_layrnorm."),
        (r"^norm\.", "post_layernorm."),
        (r"^cls_token", "embeddings.class_embedding"),
        (r"^pos_embed", "embeddings.position_embedding.weight"),
        (r"^patch_embed\.proj", "embeddings.patch_embedding"),
        (r"^", "vision_model."),
    )
    for name in ("class_embedding", "position_embedding.weight"):
        w[f"vision_model.embeddings.{name}"] = w[f"vision_model.embeddings.{name}"].squeeze()
    others = ("text_model.final_layer_norm.weight", "visual_projection.weight", "text_projection.weight")
    tokens = torch.arange(17)[None]
    return w | {name: torch.zeros(3, 3) for name in others} | {"vision_model.embeddings.position_ids": tokens}


def openai_clip(w: Weights) -> Weights:
    w = renamed(
        w,
        (r"^blocks\.", "transformer.resblocks."),
        (r"attn\.qkv\.", "attn.in_proj_"),
        (r"attn\.proj", "attn.out_proj"),
        (r"mlp\.fc1", "mlp.c_fc"),
        (r"mlp\.fc2", "mlp.c_proj"),
        (r"(resblocks\.\d+)\.norm", r"\1.ln_"),
        (r"^norm_pre", "ln_pre"),
        (r"^norm\.", "ln_post."),
        (r"^cls_token", "class_embedding"),
        (r"^pos_embed", "positional_embedding"),
        (r"^patch_embed\.proj", "conv1"),
        (r"^", "visual."),
    )
    for name in ("visual.class_embedding", "visual.positional_embedding"):
        w[name] = w[name].squeeze()
    # The projection has as many columns as the model below has classes, and still is no classifier.
    others = {
        "visual.proj": torch.ones(WIDTH, 3),
        "logit_scale": torch.tensor(1.0),
        "token_embedding.weight": w["visual.ln_post.bias"],
    }
    return w | others | {"transformer.resblocks.0.ln_1.weight": torch.zeros(8)}


def dinov2(w: Weights) -> Weights:
    return w | {"mask_token": torch.zeros(1, WIDTH)}


def dinov2_registers(w: Weights) -> Weights:
    """The class token's place in the position embedding is a row of its own, which timm adds to the token."""
    place = torch.randn(1, 1, WIDTH)
    w = renamed(dinov2(w), (r"^reg_token", "register_tokens"))
    return w | {"cls_token": w["cls_token"] - place, "pos_embed": torch.cat([place, w["pos_embed"]], 1)}


def dinov3(w: Weights) -> Weights:
    w = renamed(w, (r"gamma_([12])", r"ls\1.gamma"), (r"^reg_token", "storage_tokens"))
    for i in range(DEPTH):
        stem = f"blocks.{i}.attn."
        if f"{stem}q_bias" in w:
            q, v = w.pop(f"{stem}q_bias"), w.pop(f"{stem}v_bias")
            w |= {f"{stem}qkv.bias": torch.cat([q, torch.zeros(WIDTH), v])}
        else:
            w |= {f"{stem}qkv.bias": torch.zeros(3 * WIDTH)}
        w |= {f"{stem}qkv.bias_mask": torch.ones(3 * WIDTH)}
    return w | {"mask_token": torch.zeros(1, WIDTH), "rope_embed.periods": torch.ones(3)}


def masked_autoencoder(w: Weights) -> Weights:
    decoder = ("decoder_embed.weight", "decoder_pos_embed", "decoder_blocks.0.norm1.weight", "decoder_pred.bias")
    return w | {name: torch.zeros(1, 1) for name in (*decoder, "mask_token")}


def open_clip_of_timm(w: Weights) -> Weights:
    return renamed(w, ("^", "visual.trunk.")) | {
        "visual.head.proj.weight": torch.zeros(3, WIDTH),
        "logit_scale": torch.ones(1),
    }


VIT, CLIP = "vit_tiny_patch16_224", "vit_base_patch16_clip_quickgelu_224"
LAYOUTS: dict[str, tuple[str, Callable[[Weights], Weights], set[str]]] = {
    "timm": (VIT, dict, set()),
    "masked autoencoder": (
        VIT,
        masked_autoencoder,
        {
            "decoder_embed.weight",
            "decoder_pos_embed",
            "decoder_blocks.0.norm1.weight",
            "decoder_pred.bias",
            "mask_token",
        },
    ),
    "dinov2": ("vit_small_patch14_dinov2", dinov2, {"mask_token"}),
    "dinov2 with registers": ("vit_small_patch14_reg4_dinov2", dinov2_registers, {"mask_token"}),
    "dinov3": (
        "vit_small_patch16_dinov3_qkvb",
        dinov3,
        {"mask_token", "rope_embed.periods", *(f"blocks.{i}.attn.qkv.bias_mask" for i in range(DEPTH))},
    ),
    "dinov3 without biases": (
        "vit_small_patch16_dinov3",
        dinov3,
        {
            *("mask_token", "rope_embed.periods"),
            *(f"blocks.{i}.attn.qkv.{kind}" for i in range(DEPTH) for kind in ("bias", "bias_mask")),
        },
    ),
    "Hugging Face ViT": (VIT, hugging_face_vit, {"vit.pooler.dense.weight", "model.head.weight"}),
    "Hugging Face Dinov2": ("vit_small_patch14_dinov2", hugging_face_dinov2, {"embeddings.mask_token"}),
    "Hugging Face CLIP": (
        CLIP,
        hugging_face_clip,
        {
            *("text_model.final_layer_norm.weight", "visual_projection.weight", "text_projection.weight"),
            "vision_model.embeddings.position_ids",
        },
    ),
    "CLIP": (
        CLIP,
        openai_clip,
        {"visual.proj", "logit_scale", "token_embedding.weight", "transformer.resblocks.0.ln_1.weight"},
    ),
    "open_clip of timm": (VIT, open_clip_of_timm, {"visual.head.proj.weight", "logit_scale"}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_a_public_layout_gives_the_same_features_and_names_what_is_left_behind(
    layout: str, ending: str, tmp_path: Path
) -> None:
    name, written, left = LAYOUTS[layout]
    torch.manual_seed(0)
    expected, path = built(name), tmp_path / f"weights.{ending}"
    file = written({k: v.clone() for k, v in expected.model.state_dict().items() if not k.startswith("head.")})
    if ending == "pth":
        torch.save({"model": file}, path)
    else:
        save_file({k: v.clone() for k, v in file.items()}, path)
    model = built(name)
    head = model.model.head.weight.clone()
    report = load_weights(model, path)
    images = torch.randn(2, 3, 28, 28)
    torch.testing.assert_close(model.forward_features(images), expected.forward_features(images), rtol=1e-5, atol=1e-5)
    assert set(report.dropped) == left
    assert set(report.fresh) == {"model.head.weight", "model.head.bias"}
    assert torch.equal(model.model.head.weight, head)


@pytest.mark.parametrize("layout", ["timm", "dinov2", "dinov2 with registers", "Hugging Face Dinov2", "CLIP"])
def test_a_position_embedding_is_resized_to_the_images(layout: str, tmp_path: Path) -> None:
    """A constant one stays constant, the class token's own row stays as it is, and all else is the file's."""
    name, written, _ = LAYOUTS[layout]
    weights = source(name)
    prefix = weights["pos_embed"].shape[1] - 16
    weights["pos_embed"][:, prefix:] = 0.25
    torch.save(written(weights), tmp_path / "weights.pth")
    model = built(name, size=42)
    load_weights(model, tmp_path / "weights.pth")
    embedding = model.model.pos_embed
    assert embedding.shape == (1, prefix + 36, WIDTH)
    torch.testing.assert_close(embedding[:, prefix:], torch.full((1, 36, WIDTH), 0.25))
    torch.testing.assert_close(embedding[:, :prefix], weights["pos_embed"][:, :prefix])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_missing_or_unknown_key_is_refused_in_one_sentence(layout: str, tmp_path: Path) -> None:
    name, written, _ = LAYOUTS[layout]
    whole = written(source(name))
    lost = next(k for k in whole if re.search(r"\.1\..*(fc2|dense|c_proj)\.bias", k))
    for file, sentence in (
        ({k: v for k, v in whole.items() if k != lost}, r"does not fit this model: model\.blocks\.1\.\S+ is missing"),
        (whole | {f"{lost.rpartition('.')[0]}.extra": torch.zeros(3)}, r"extra has no place here \(1 such problems\)"),
    ):
        torch.save(file, tmp_path / "weights.pth")
        with pytest.raises(HandoverError, match=sentence):
            load_weights(built(name), tmp_path / "weights.pth")


def test_biases_that_a_model_cannot_hold_are_refused(tmp_path: Path) -> None:
    weights = source("vit_small_patch16_dinov3_qkvb")
    torch.save(dinov3(weights), tmp_path / "weights.pth")
    with pytest.raises(HandoverError, match=r"qkv\.bias has no place here"):
        load_weights(built("vit_small_patch16_dinov3"), tmp_path / "weights.pth")
