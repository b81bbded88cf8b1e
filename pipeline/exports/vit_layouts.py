"""Public layouts of Vision Transformers' weights, under the names that timm's models have.

Read are timm's own files; DINOv2 and DINOv3 as their authors release them; Hugging Face's ViT, ViTMAE, Dinov2 (with and without
registers), DINOv3 and CLIP, in the names of transformers 4 and 5; CLIP's `visual.` as OpenAI and open_clip release it;
masked autoencoders with their decoders. A key that a classifier does not need is left behind and named. Any other key keeps
its name, so that the model's check refuses it.

The values are those of the file but for: query, key and value, which timm keeps in one matrix; the two halves of a gated MLP;
and the class token of DINOv2 with registers, to which timm adds its place in the position embedding.
"""

import re
from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

_HUGGING_FACE = re.compile(r"(^|\.)embeddings\.patch_embeddings?(\.projection)?\.weight$")
_HF_PREFIX = re.compile(r"^(vit|dinov2|dinov2_with_registers|dinov3_vit|vision_model|clip)\.(?:vision_model\.)?")
_HF_LEFT = re.compile(
    r"(embeddings\.(mask_token|position_ids)|pooler\.|decoder\.|text_model\.|(visual|text)_projection\.|logit_scale)"
)
_HF_NAMES = (
    (r"embeddings\.(?:cls_token|class_embedding)", "cls_token"),
    (r"embeddings\.register_tokens", "reg_token"),
    (r"embeddings\.position_embedding(?:s|\.weight)", "pos_embed"),
    (r"embeddings\.patch_embeddings?(?:\.projection)?\.(weight|bias)", r"patch_embed.proj.\1"),
    (r"pre_layrnorm\.(\w+)", r"norm_pre.\1"),  # so spelt in the files
    (r"(?:layernorm|post_layernorm|norm)\.(\w+)", r"norm.\1"),
    (r"classifier\.(\w+)", r"head.\1"),
)
_HF_BLOCK = re.compile(r"(?:encoder\.|model\.)?layers?\.(\d+)\.(.+)")
_HF_BLOCK_NAMES = (
    (r"(?:attention\.attention\.query|(?:attention|self_attn)\.q_proj)\.(\w+)", r"attn.q.\1"),
    (r"(?:attention\.attention\.key|(?:attention|self_attn)\.k_proj)\.(\w+)", r"attn.k.\1"),
    (r"(?:attention\.attention\.value|(?:attention|self_attn)\.v_proj)\.(\w+)", r"attn.v.\1"),
    (r"(?:attention\.output\.dense|attention\.o_proj|self_attn\.out_proj)\.(\w+)", r"attn.proj.\1"),
    (r"(?:intermediate\.dense|mlp\.weights_in)\.(\w+)", r"mlp.fc1.\1"),
    (r"(?:output\.dense|mlp\.weights_out|mlp\.down_proj)\.(\w+)", r"mlp.fc2.\1"),
    (r"mlp\.gate_proj\.(\w+)", r"mlp.fc1_g.\1"),
    (r"mlp\.up_proj\.(\w+)", r"mlp.fc1_x.\1"),
    (r"(?:layernorm_before|layer_norm1)\.(\w+)", r"norm1.\1"),
    (r"(?:layernorm_after|layer_norm2)\.(\w+)", r"norm2.\1"),
    (r"layer_scale([12])\.lambda1", r"ls\1.gamma"),
)
_CLIP_NAMES = (
    (r"conv1\.weight", "patch_embed.proj.weight"),
    (r"class_embedding", "cls_token"),
    (r"positional_embedding", "pos_embed"),
    (r"ln_pre\.(\w+)", r"norm_pre.\1"),
    (r"ln_post\.(\w+)", r"norm.\1"),
    (r"transformer\.resblocks\.(\d+)\.ln_([12])\.(\w+)", r"blocks.\1.norm\2.\3"),
    (r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(\w+)", r"blocks.\1.attn.qkv.\2"),
    (r"transformer\.resblocks\.(\d+)\.attn\.out_proj\.(\w+)", r"blocks.\1.attn.proj.\2"),
    (r"transformer\.resblocks\.(\d+)\.mlp\.c_fc\.(\w+)", r"blocks.\1.mlp.fc1.\2"),
    (r"transformer\.resblocks\.(\d+)\.mlp\.c_proj\.(\w+)", r"blocks.\1.mlp.fc2.\2"),
)
_DINO_NAMES = (
    (r"(?:register_tokens|storage_tokens)", "reg_token"),
    (r"blocks\.\d+\.(\d+)\.(.+)", r"blocks.\1.\2"),  # blocks in chunks, as training saves them
    (r"(blocks\.\d+\.mlp)\.w12\.(\w+)", r"\1.fc1.\2"),
    (r"(blocks\.\d+\.mlp)\.w1\.(\w+)", r"\1.fc1_g.\2"),
    (r"(blocks\.\d+\.mlp)\.w2\.(\w+)", r"\1.fc1_x.\2"),
    (r"(blocks\.\d+\.mlp)\.w3\.(\w+)", r"\1.fc2.\2"),
)
_DINO_LEFT = re.compile(r"mask_token$|rope_embed\.|blocks\.\d+\.attn\.qkv\.bias_mask|local_cls_norm\.")


class Renamed(NamedTuple):
    """Weights under timm's names.

    Attributes:
        layout: What the file was told to be, for people.
        weights: Tensors by timm's name.
        left: Keys of the file that are not needed.
    """

    layout: str
    weights: dict[str, Tensor]
    left: list[str]


def timm_names(file: Mapping[str, Tensor], wanted: Collection[str]) -> Renamed:
    """Give the weights of a public file the names that a Vision Transformer of timm has.

    Args:
        file: Tensors by the file's names.
        wanted: The names of the model, which differ between timm's families (`ls1.gamma`, `gamma_1`).

    Returns:
        The weights, the layout that was told, and what is left behind. A file of another layout is returned as it is.
    """
    layout, weights, left = _renamed(file)
    if "patch_embed.proj.weight" not in weights:
        return Renamed(layout, weights, left)
    for name in ("cls_token", "pos_embed"):
        if name in weights:
            weights[name] = weights[name].reshape(1, -1, weights[name].shape[-1])
    if "blocks.0.gamma_1" in wanted:
        weights = {re.sub(r"\.ls([12])\.gamma$", r".gamma_\1", name): value for name, value in weights.items()}
    weights = _one_matrix(weights, wanted, left)
    if (
        "reg_token" in weights
        and "cls_token" in weights
        and weights.get("pos_embed", weights["cls_token"]).shape[1] > 1
    ):
        patches = weights["pos_embed"].shape[1] - 1
        if "reg_token" in wanted and round(patches**0.5) ** 2 == patches:
            weights["cls_token"] = weights["cls_token"] + weights["pos_embed"][:, :1]
            weights["pos_embed"] = weights["pos_embed"][:, 1:]
    if "fc_norm.weight" in wanted and "norm.weight" not in wanted:
        # With mean pooling timm's ViT has its norm behind the pool instead of before it. That of the file is for tokens.
        left += [name for name in weights if name.startswith("norm.")]
        weights = {name: value for name, value in weights.items() if not name.startswith("norm.")}
    return Renamed(layout, weights, left)


def _renamed(file: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor], list[str]]:
    """Tell the layout and give every key its name; qkv may still be in three parts."""
    if any(_HUGGING_FACE.search(name) for name in file):
        return "Hugging Face", *_hugging_face(file)
    trunk = "visual.trunk."
    if any(name.startswith(trunk) for name in file):
        kept = {name.removeprefix(trunk): value for name, value in file.items() if name.startswith(trunk)}
        return "open_clip with a model of timm", kept, [name for name in file if not name.startswith(trunk)]
    for prefix in ("visual.", ""):
        if f"{prefix}class_embedding" in file and f"{prefix}conv1.weight" in file:
            return "CLIP", *_clip(file, prefix)
    if any(name.startswith("decoder_") for name in file):
        left = [name for name in file if name.startswith("decoder_") or name == "mask_token"]
        return "masked autoencoder", {k: v for k, v in file.items() if k not in left}, left
    if "mask_token" in file or "storage_tokens" in file or "register_tokens" in file:
        left = [name for name in file if _DINO_LEFT.search(name)]
        return "DINO", {_name(k, _DINO_NAMES): v for k, v in file.items() if k not in left}, left
    return "timm", dict(file), []


def _name(key: str, table: tuple[tuple[str, str], ...]) -> str:
    for pattern, name in table:
        if found := re.fullmatch(pattern, key):
            return found.expand(name)
    return key


def _hugging_face(file: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    weights: dict[str, Tensor] = {}
    width = next(v.shape[0] for k, v in file.items() if _HUGGING_FACE.search(k))
    left = []
    for key, value in file.items():
        bare = _HF_PREFIX.sub("", key)
        # A classifier of DINOv2 reads the class token beside the mean of the patches: 2 x width.
        if _HF_LEFT.match(bare) or (bare == "classifier.weight" and value.shape[-1] != width):
            left.append(key)
        elif block := _HF_BLOCK.fullmatch(bare):
            weights[f"blocks.{block[1]}.{_name(block[2], _HF_BLOCK_NAMES)}"] = value
        else:
            weights[_name(bare, _HF_NAMES)] = value
    if "head.bias" in weights and "head.weight" not in weights:
        left.append(next(key for key in file if key.endswith("classifier.bias")))
        del weights["head.bias"]
    return weights, left


def _clip(file: Mapping[str, Tensor], prefix: str) -> tuple[dict[str, Tensor], list[str]]:
    inside = {name: name.removeprefix(prefix) for name in file if name.startswith(prefix)}
    # The projection leads to the space that images and texts share; it is no classifier.
    left = [name for name in file if name not in inside or inside[name] == "proj"]
    return {_name(inside[k], _CLIP_NAMES): v for k, v in file.items() if k not in left}, left


def _one_matrix(weights: dict[str, Tensor], wanted: Collection[str], left: list[str]) -> dict[str, Tensor]:
    """Put query, key and value together, and gate and value of a gated MLP, as the model has them."""
    result = dict(weights)
    for name in weights:
        if name.endswith(".mlp.fc1_x.weight"):
            _mlp(result, name.removesuffix("fc1_x.weight"), wanted)
        if name.endswith(".attn.q.weight"):
            stem = name.removesuffix("q.weight")
            parts = [result.pop(f"{stem}{part}.weight", None) for part in "qkv"]
            if all(part is not None for part in parts):
                result[f"{stem}qkv.weight"] = torch.cat([part for part in parts if part is not None])
            biases = [result.pop(f"{stem}{part}.bias", None) for part in "qkv"]
            q = next((bias for bias in biases if bias is not None), None)
            if q is not None:  # DINOv3 has none for the keys
                result[f"{stem}qkv.bias"] = torch.cat([torch.zeros_like(q) if b is None else b for b in biases])
    for name in [name for name in result if name.endswith(".attn.qkv.bias") and name not in wanted]:
        _split_bias(result, name, wanted, left)
    return result


def _mlp(weights: dict[str, Tensor], stem: str, wanted: Collection[str]) -> None:
    """Give the first layer of an MLP the form of the model: one matrix, or one for the gate and one for the value."""
    gated = f"{stem}fc1_g.weight" in weights
    if gated and f"{stem}fc1_g.weight" in wanted:
        return
    for kind in ("weight", "bias"):
        parts = [weights.pop(f"{stem}{part}.{kind}", None) for part in ("fc1_g", "fc1_x")]
        if any(part is not None for part in parts):
            weights[f"{stem}fc1.{kind}"] = torch.cat([part for part in parts if part is not None])


def _split_bias(weights: dict[str, Tensor], name: str, wanted: Collection[str], left: list[str]) -> None:
    """Give DINOv3's biases the form of the model: those of query and value alone, or none if all of them are zero."""
    stem = name.removesuffix("qkv.bias")
    q, _, v = weights[name].chunk(3)
    if f"{stem}q_bias" in wanted:
        weights[f"{stem}q_bias"], weights[f"{stem}v_bias"] = q, v
    elif q.any() or v.any():
        return  # the check names it as a key without a place
    else:
        left.append(name)
    del weights[name]
