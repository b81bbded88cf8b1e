"""Checkpoints as Vim and ARM released them: every key and shape of their layouts, typed out, filled with random weights."""

from argparse import Namespace
from typing import Any

import torch
from torch import Tensor

from pipeline.models.arm import ARM
from pipeline.models.vision_mamba.position_embedding import sincos_position_embedding

Shapes = dict[str, tuple[int, ...]]


def vim(*, dim: int, depth: int, tokens: int, classes: int, patch: int = 16) -> Shapes:
    """Two directions, expand 2, RMSNorm, no MLP; `tokens` with the cls token's."""
    shapes: Shapes = _stem(dim, tokens, patch) | {"cls_token": (1, 1, dim), "norm_f.weight": (dim,)}
    for i in range(depth):
        shapes[f"layers.{i}.norm.weight"] = (dim,)
        shapes |= _mixer(f"layers.{i}.mixer", dim, 2 * dim, ("", "_b"))
    return shapes | {"head.weight": (classes, dim), "head.bias": (classes,)}


def arm_fine_tuned(*, dim: int, depth: int, tokens: int, classes: int, patch: int = 16) -> Shapes:
    shapes = _stem(dim, tokens, patch) | {"cls_token": (1, 1, dim)} | _arm_blocks(dim, depth, ("", "_b", "_c", "_c_b"))
    shapes |= _affine("norm_f", dim)
    return shapes | {"head.weight": (classes, dim), "head.bias": (classes,)}


def arm_pretraining(
    *, dim: int, depth: int, tokens: int, group: int, width: int = 512, blocks: int = 4, patch: int = 16
) -> Shapes:
    shapes = _stem(dim, tokens, patch) | _arm_blocks(dim, depth, ("",))
    for k in range(1, 5):
        shapes |= _affine(f"norm_{k}", dim)
    shapes |= {"enc2dec.weight": (width * blocks, 4 * dim), "enc2dec.bias": (width * blocks,)}
    shapes |= {"ar_token": (1, 1, width), "dec_pos_embed": (1, tokens, width)}
    for j in range(blocks):
        for name, out, inside in (("q", width, width), ("kv", 2 * width, width), ("proj", width, width)):
            shapes |= _linear(f"dec_block.{j}.attn2.{name}", out, inside)
        for name in ("norm2_1", "norm2_2", "norm2"):
            shapes |= _affine(f"dec_block.{j}.{name}", width)
        shapes |= _linear(f"dec_block.{j}.mlp.fc1", 4 * width, width)
        shapes |= _linear(f"dec_block.{j}.mlp.fc2", width, 4 * width)
    shapes |= _affine("ar_norm", width) | _linear("ar_pred", 3 * patch * patch, width)
    return shapes | {"mask": (tokens - group, tokens - group)}


def filled(shapes: Shapes, *, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random weights of a sensible size; what is no weight in a released file is as it is there."""
    torch.manual_seed(0)
    state = {name: 0.3 * torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}
    for name in state:
        if name.endswith("_log"):
            state[name] = torch.rand(shapes[name], dtype=dtype)
    if "mask" in state:
        group = shapes["pos_embed"][1] - shapes["mask"][0]
        which = torch.arange(shapes["mask"][0]) // group
        state["mask"] = torch.zeros(shapes["mask"]).masked_fill(which[:, None] < which[None, :], -torch.inf).to(dtype)
        side = round(shapes["pos_embed"][1] ** 0.5)
        for name in ("pos_embed", "dec_pos_embed"):
            state[name] = sincos_position_embedding((side, side), shapes[name][2]).to(dtype)
    return state


def checkpoint(model: dict[str, Tensor]) -> dict[str, Any]:
    """What a training script saves around the weights."""
    arguments = Namespace(model="arm_base_pz16", lr=1.5e-4, output_dir="out", nb_classes=1000, distributed=True)
    return {"model": model, "optimizer": {"state": {}, "param_groups": [{"lr": 1.0}]}, "epoch": 299, "args": arguments}


def under_released_names(arm: ARM) -> dict[str, Tensor]:
    """A pretrainer's weights as a released file names them."""
    parts = {
        "to_decoder": "enc2dec",
        "norm": "ar_norm",
        "to_pixels": "ar_pred",
        "norms.0": "norm_1",
        "norms.1": "norm_2",
        "norms.2": "norm_3",
        "norms.3": "norm_4",
    }
    inner = {
        "q": "attn2.q",
        "kv": "attn2.kv",
        "proj": "attn2.proj",
        "norm_q": "norm2_1",
        "norm_kv": "norm2_2",
        "norm_mlp": "norm2",
        "mlp.0": "mlp.fc1",
        "mlp.2": "mlp.fc2",
    }
    state: dict[str, Tensor] = {}
    for key, value in arm.state_dict().items():
        module, _, kind = key.rpartition(".")
        if key == "query":
            state["ar_token"] = value
        elif key.startswith("backbone."):
            state[key.removeprefix("backbone.")] = value
        elif key.startswith("blocks."):
            _, j, name = module.split(".", 2)
            state[f"dec_block.{j}.{inner[name]}.{kind}"] = value
        else:
            state[f"{parts[module]}.{kind}"] = value
    state["dec_pos_embed"] = sincos_position_embedding(arm.backbone.grid_size, arm.query.shape[-1]).to(arm.query)
    return state


def _stem(dim: int, tokens: int, patch: int) -> Shapes:
    return {
        "pos_embed": (1, tokens, dim),
        "patch_embed.proj.weight": (dim, 3, patch, patch),
        "patch_embed.proj.bias": (dim,),
    }


def _mixer(name: str, dim: int, inner: int, suffixes: tuple[str, ...]) -> Shapes:
    rank = -(-dim // 16)
    shapes: Shapes = {f"{name}.in_proj.weight": (2 * inner, dim), f"{name}.out_proj.weight": (dim, inner)}
    for s in suffixes:
        shapes |= {
            f"{name}.conv1d{s}.weight": (inner, 1, 4),
            f"{name}.conv1d{s}.bias": (inner,),
            f"{name}.x_proj{s}.weight": (rank + 32, inner),
            f"{name}.dt_proj{s}.weight": (inner, rank),
            f"{name}.dt_proj{s}.bias": (inner,),
            f"{name}.A{s}_log": (inner, 16),
            f"{name}.D{s}": (inner,),
        }
    return shapes


def _arm_blocks(dim: int, depth: int, suffixes: tuple[str, ...]) -> Shapes:
    shapes: Shapes = {}
    for i in range(depth):
        shapes |= _mixer(f"layers.{i}.mixer", dim, dim, suffixes)
        shapes |= _linear(f"layers.{i}.mlp.w1", 8 * dim // 3, dim) | _linear(f"layers.{i}.mlp.w2", 8 * dim // 3, dim)
        shapes |= _linear(f"layers.{i}.mlp.w3", dim, 8 * dim // 3)
        shapes |= _affine(f"layers.{i}.norm1", dim) | _affine(f"layers.{i}.norm2", dim)
    return shapes


def _linear(name: str, out: int, inside: int) -> Shapes:
    return {f"{name}.weight": (out, inside), f"{name}.bias": (out,)}


def _affine(name: str, dim: int) -> Shapes:
    return {f"{name}.weight": (dim,), f"{name}.bias": (dim,)}
