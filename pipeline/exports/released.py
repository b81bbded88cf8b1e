"""How others lay out their released weights: the names, and what the shapes say of the model.

A layout is told by a key that only its files hold, and `LAYOUTS` lists all that `convert` reads. Names are given with `*`
for a block's number. Sources: the released Vim, ARM and EfficientViM checkpoints, as their authors' repositories lay them out.

Not in any shape, so assumed: the decoder's heads are 64 wide, and of its three norms `norm2_1` is the queries', `norm2_2`
the features', `norm2` the MLP's.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.errors import HandoverError
from pipeline.models.arm import ARM
from pipeline.models.config import DecoderConfig, EfficientViMConfig, FamilyConfig, VisionMambaConfig
from pipeline.models.variants import EFFICIENTVIM_VARIANTS, PRETRAINING_FORM, VISION_MAMBA_VARIANTS
from pipeline.models.vision_mamba.mixer import DIRECTIONS
from pipeline.models.vision_mamba.position_embedding import sincos_position_embedding

Weights = Mapping[str, Tensor]
ImageSize = tuple[int, int] | None
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")  # of a block
HEAD_WIDTH = 64
NUM_TAPS = 4
_USUAL_SIDE = 224  # pixels of the images that Vim's released models were trained on


class Layout(NamedTuple):
    """`describe`: the config that the shapes spell, at an image size if they leave it open. `names`: released key -> ours;
    none: they are alike. `computed`: what a file holds beside weights, and what our model has there: compared, not loaded."""

    name: str
    told_by: str
    describe: Callable[[Weights, ImageSize], tuple[FamilyConfig, DecoderConfig | None]]
    names: Mapping[str, str] | None = None
    computed: Callable[[nn.Module], dict[str, Tensor]] = lambda model: {}

    def our_name(self, key: str) -> str | None:
        """What a released key is called here; none: it has no place."""
        if self.names is None:
            return key
        ours = self.names.get(starred(key))
        number = _NUMBER.search(key)
        return ours.replace("*", number.group()) if ours and number else ours


def starred(key: str) -> str:
    """layers.3.norm.weight -> layers.*.norm.weight"""
    return _NUMBER.sub("*", key, count=1)


def layout_of(weights: Weights) -> Layout:
    """The first layout whose key is there. Raises HandoverError with what is known."""
    for layout in LAYOUTS:
        if layout.told_by in weights:
            return layout
    known = ", ".join(f"{layout.name} ({layout.told_by})" for layout in LAYOUTS)
    raise HandoverError(f"its keys ({_some(weights)}) are of no known layout; known, by the key that tells it: {known}")


def shape_of(weights: Weights, key: str, dims: int) -> tuple[int, ...]:
    """Raises HandoverError if the key is missing or its tensor has other than `dims` dimensions."""
    if key not in weights:
        raise HandoverError(f"it lacks {key}, which says how large the model is")
    shape = tuple(weights[key].shape)
    if len(shape) != dims or 0 in shape:
        raise HandoverError(f"its {key} is {shape}; {dims} dimensions, none of them 0, are needed")
    return shape


def _with_biases(*modules: str) -> list[str]:
    return [f"{module}.{kind}" for module in modules for kind in ("weight", "bias")]


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


_MIXER = [
    f"layers.*.mixer.{name}"
    for s in DIRECTIONS
    for name in (*_with_biases(f"conv1d{s}", f"dt_proj{s}"), f"x_proj{s}.weight", f"A{s}_log", f"D{s}")
]
_TRUNK = ["pos_embed", *_with_biases("patch_embed.proj"), *_MIXER]
_TRUNK += ["layers.*.mixer.in_proj.weight", "layers.*.mixer.out_proj.weight"]
_SWIGLU = _with_biases("layers.*.mlp.w1", "layers.*.mlp.w2", "layers.*.mlp.w3", "layers.*.norm1", "layers.*.norm2")
_DECODER = {
    "attn2.q": "q",
    "attn2.kv": "kv",
    "attn2.proj": "proj",
    "norm2_1": "norm_q",
    "norm2_2": "norm_kv",
    "norm2": "norm_mlp",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.2",
}
_PRETRAINING = {f"dec_block.*.{theirs}": f"blocks.*.{ours}" for theirs, ours in _DECODER.items()}
_PRETRAINING |= {f"norm_{k + 1}": f"norms.{k}" for k in range(NUM_TAPS)}
# Rows of enc2dec: decoder block j's are j, j + depth, j + 2 depth, ...; our decoder reads them in that order too.
_PRETRAINING |= {"enc2dec": "to_decoder", "ar_norm": "norm", "ar_pred": "to_pixels"}


def _trunk(weights: Weights, image_size: ImageSize, family: str) -> dict[str, Any]:
    """The fields that the shapes of a Vision Mamba tell."""
    dim, channels, patch, _ = shape_of(weights, "patch_embed.proj.weight", 4)
    inner, states = shape_of(weights, "layers.0.mixer.A_log", 2)
    depth = len({key.split(".")[1] for key in weights if key.startswith("layers.")})
    tokens = shape_of(weights, "pos_embed", 3)[1] - ("cls_token" in weights)
    size, stride = _geometry(tokens, patch, image_size)
    named = [n for n, v in VISION_MAMBA_VARIANTS.items() if n.startswith(family)]
    same = [
        n for n in named if (VISION_MAMBA_VARIANTS[n]["embed_dim"], VISION_MAMBA_VARIANTS[n]["depth"]) == (dim, depth)
    ]
    return {
        "name": (same or named)[0],
        "image_size": size,
        "patch_size": patch,
        "stride": stride,
        "in_chans": channels,
        "embed_dim": dim,
        "depth": depth,
        "d_state": states,
        "d_conv": shape_of(weights, "layers.0.mixer.conv1d.weight", 3)[2],
        "expand": max(1, inner // dim),
        "directions": sum(f"layers.0.mixer.D{s}" in weights for s in DIRECTIONS),
        "num_classes": shape_of(weights, "head.weight", 2)[0] if "head.weight" in weights else 0,
    }


def _geometry(tokens: int, patch: int, image_size: ImageSize) -> tuple[tuple[int, int], int | None]:
    """Image size and stride (none = patch) that give as many patches; a square image, if none is given."""
    if image_size is None:
        side = math.isqrt(tokens)
        if side * side != tokens or not side:
            raise HandoverError(f"its {tokens} positions are no square; give --image-size HEIGHT WIDTH")
        if (side - 1) * patch // 2 + patch == _USUAL_SIDE:  # Vim's fine-grained models: patches that overlap by half
            raise HandoverError(
                f"its {tokens} positions are {side} x {side} patches of {patch} px side by side, or of {_USUAL_SIDE} px"
                f" overlapping by half; say which: --image-size {side * patch} or --image-size {_USUAL_SIDE}"
            )
        return (side * patch, side * patch), None
    for stride in range(patch, 0, -1):
        if math.prod((side - patch) // stride + 1 for side in image_size) == tokens:
            return image_size, stride if stride < patch else None
    raise HandoverError(
        f"no stride cuts {image_size} pixels into its {tokens} patches of {patch}; give another --image-size"
    )


def _describe_vim(weights: Weights, image_size: ImageSize) -> tuple[VisionMambaConfig, None]:
    return VisionMambaConfig(**_trunk(weights, image_size, "vim_")), None


def _describe_arm(weights: Weights, image_size: ImageSize) -> tuple[VisionMambaConfig, None]:
    return VisionMambaConfig(**_trunk(weights, image_size, "arm_")), None


def _describe_arm_pretraining(weights: Weights, image_size: ImageSize) -> tuple[VisionMambaConfig, DecoderConfig]:
    fields = _trunk(weights, image_size, "arm_")
    tokens, predicted = shape_of(weights, "pos_embed", 3)[1], shape_of(weights, "mask", 2)[0]
    # K clusters of T patches: the mask has (K - 1) T rows.
    cluster = math.isqrt(max(0, tokens - predicted)) * fields["patch_size"]
    width = shape_of(weights, "ar_token", 3)[2]
    decoder = DecoderConfig(
        width=width,
        depth=len({key.split(".")[1] for key in weights if key.startswith("dec_block.")}),
        num_heads=max(1, width // HEAD_WIDTH),
        mlp_ratio=shape_of(weights, "dec_block.0.mlp.fc1.weight", 2)[0] / width,
    )
    return VisionMambaConfig(**fields | PRETRAINING_FORM | {"order": "cluster", "cluster_size": cluster}), decoder


def _describe_efficientvim(weights: Weights, image_size: ImageSize) -> tuple[EfficientViMConfig, None]:
    first = [f"stages.{s}.blocks.0" for s in range(3)]
    blocks = [{key.split(".")[3] for key in weights if key.startswith(f"stages.{s}.blocks.")} for s in range(3)]
    widths = tuple(shape_of(weights, f"{block}.alpha", 2)[1] for block in first)
    told = {
        "widths": widths,
        "depths": tuple(map(len, blocks)),
        "states": tuple(shape_of(weights, f"{block}.mixer.A", 1)[0] for block in first),
        "distilled": "weights_dist" in weights,
    }
    variants = {name: EfficientViMConfig.model_validate({"name": name}).model_dump() for name in EFFICIENTVIM_VARIANTS}
    same = [name for name, values in variants.items() if told.items() <= values.items()]
    fields = {
        "name": (same or list(variants))[0],
        "expand": max(1, shape_of(weights, f"{first[0]}.mixer.hz_proj.conv.weight", 3)[0] // (2 * widths[0])),
        "mlp_ratio": shape_of(weights, f"{first[0]}.ffn.fc1.conv.weight", 4)[0] / widths[0],
        "stem_stride": 2 ** len({key.split(".")[2] for key in weights if key.startswith("patch_embed.conv.")}),
        "num_classes": shape_of(weights, "heads.0.weight", 2)[0],
    }
    given = {"image_size": image_size} if image_size else {}
    return EfficientViMConfig.model_validate(told | fields | given), None


def _computed_by_arm(model: nn.Module) -> dict[str, Tensor]:
    assert isinstance(model, ARM)
    width = model.position_embedding.shape[-1]
    return {
        "mask": torch.zeros(model.mask.shape).masked_fill(~model.mask, -torch.inf),
        "dec_pos_embed": sincos_position_embedding(model.backbone.grid_size, width),
    }


LAYOUTS = (
    Layout(
        name="ARM, pretraining",
        told_by="enc2dec.weight",
        names={name: f"backbone.{name}" for name in (*_TRUNK, *_SWIGLU)}
        | {f"{t}.{kind}": f"{o}.{kind}" for t, o in _PRETRAINING.items() for kind in ("weight", "bias")}
        | {"ar_token": "query"},
        describe=_describe_arm_pretraining,
        computed=_computed_by_arm,
    ),
    Layout(
        name="ARM, fine-tuned",
        told_by="layers.0.mlp.w1.weight",
        names=_same("cls_token", *_TRUNK, *_SWIGLU, *_with_biases("norm_f", "head")),
        describe=_describe_arm,
    ),
    Layout(
        name="Vim",
        told_by="layers.0.mixer.A_b_log",
        names=_same("cls_token", *_TRUNK, "layers.*.norm.weight", "norm_f.weight", *_with_biases("head")),
        describe=_describe_vim,
    ),
    Layout(name="EfficientViM", told_by="stages.0.blocks.0.mixer.hz_proj.conv.weight", describe=_describe_efficientvim),
)


def _some(names: Mapping[str, Any]) -> str:
    listed = list(names)
    return ", ".join(listed[:3]) + (", ..." if len(listed) > 3 else "")
