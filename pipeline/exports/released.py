"""Layouts of released weights: their names, and what their shapes tell about the model.

A key that only one layout has tells it, and `LAYOUTS` lists all layouts that `convert` reads. In names, `*` is the number
of a block. Sources: the released Vim, ARM and EfficientViM checkpoints, in the layout of their authors' repositories.

What no shape tells is a layout's `usual` and `assumed`: `assumptions` decides the first, and cards list both.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.errors import HandoverError
from pipeline.evaluation_view import USUAL, EvaluationView
from pipeline.models.arm import ARM
from pipeline.models.config import DecoderConfig, EfficientViMConfig, VisionMambaConfig
from pipeline.models.family import FamilyConfig
from pipeline.models.variants import EFFICIENTVIM_VARIANTS, PRETRAINING_FORM, VISION_MAMBA_VARIANTS
from pipeline.models.vision_mamba.mixer import DIRECTIONS
from pipeline.models.vision_mamba.position_embedding import sincos_position_embedding

Weights = Mapping[str, Tensor]
ImageSize = tuple[int, int] | None
_BLOCK_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
HEAD_WIDTH = 64
NUM_TAPS = 4
_NORMS = "norms add 1e-5 to the mean square or the variance"
_USUAL_SIDE = 224  # pixels of the images that Vim's released models were trained on


class Layout(NamedTuple):
    """How one project names its released weights.

    Attributes:
        name: For people.
        told_by: A key that only files of this layout have.
        describe: Maps the weights, and the image size if they leave it open, to the model's config.
        names: Released key -> our key; None = they are equal.
        usual: Fields of the config that no shape tells, with the values of the project's models.
        certain: Whether the project's code has no other form.
        assumed: What else is taken for granted, for people.
        size: What tells the image size if nobody gives it, for people.
        view: Maps the image size to the view that the project's own evaluation shows.
        computed: Maps our model to the constants that files hold besides weights. They are compared, not loaded.
    """

    name: str
    told_by: str
    describe: Callable[[Weights, ImageSize], tuple[FamilyConfig, DecoderConfig | None]]
    names: Mapping[str, str] | None = None
    usual: Mapping[str, str] = {}
    certain: bool = True
    assumed: tuple[str, ...] = ()
    size: str = "the patches lie in a square, side by side"
    view: Callable[[tuple[int, int]], EvaluationView] = lambda size: USUAL
    computed: Callable[[nn.Module], dict[str, Tensor]] = lambda model: {}

    def left_open(self, weights: Weights) -> dict[str, str]:
        """Return the fields that no shape of these weights tells, with their usual values."""
        told = () if "cls_token" in weights else ("cls_token", "pool")
        return {field: value for field, value in self.usual.items() if field not in told}

    def our_name(self, key: str) -> str | None:
        """Return our name of a released key, or None if it has no place."""
        if self.names is None:
            return key
        ours = self.names.get(starred(key))
        number = _BLOCK_NUMBER.search(key)
        return ours.replace("*", number.group()) if ours and number else ours


def starred(key: str) -> str:
    """Replace the block's number: layers.3.norm.weight -> layers.*.norm.weight."""
    return _BLOCK_NUMBER.sub("*", key, count=1)


def layout_of(weights: Weights) -> Layout:
    """Return the first layout whose key is there; raise HandoverError with the known layouts otherwise."""
    for layout in LAYOUTS:
        if layout.told_by in weights:
            return layout
    known = ", ".join(f"{layout.name} ({layout.told_by})" for layout in LAYOUTS)
    raise HandoverError(
        f"its keys ({_some(weights)}) belong to no known layout; known layouts, with the key of each: {known}"
    )


def shape_of(weights: Weights, key: str, dims: int) -> tuple[int, ...]:
    """Return a tensor's shape; raise HandoverError if it is missing, empty, or has other than `dims` dimensions."""
    if key not in weights:
        raise HandoverError(f"it lacks {key}, which tells how large the model is")
    shape = tuple(weights[key].shape)
    if len(shape) != dims or 0 in shape:
        raise HandoverError(f"its {key} has the shape {shape}; expected {dims} dimensions, none of them 0")
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
# Decoder block j reads the rows j, j + depth, j + 2 depth, ... of enc2dec. Our decoder does the same.
_PRETRAINING |= {"enc2dec": "to_decoder", "ar_norm": "norm", "ar_pred": "to_pixels"}


def _trunk(weights: Weights, image_size: ImageSize, family: str) -> dict[str, Any]:
    """Return the fields of a config that the shapes of a Vision Mamba tell."""
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
        **({} if "cls_token" in weights else {"cls_token": "none", "pool": "mean"}),
    }


def _geometry(tokens: int, patch: int, image_size: ImageSize) -> tuple[tuple[int, int], int | None]:
    """Return image size and stride (None = patch) that give `tokens` patches; by default the image is square."""
    if image_size is None:
        side = math.isqrt(tokens)
        if side * side != tokens or not side:
            raise HandoverError(f"its {tokens} patches do not lie in a square; give --image-size HEIGHT WIDTH")
        if (side - 1) * patch // 2 + patch == _USUAL_SIDE:  # Vim's fine-grained models: patches that overlap by half
            raise HandoverError(
                f"its {side} x {side} patches of {patch} px lie side by side in images of {side * patch} px, or overlap by half"
                f" in images of {_USUAL_SIDE} px; give --image-size {side * patch} or --image-size {_USUAL_SIDE}"
            )
        return (side * patch, side * patch), None
    for stride in range(patch, 0, -1):
        if math.prod((side - patch) // stride + 1 for side in image_size) == tokens:
            return image_size, stride if stride < patch else None
    raise HandoverError(
        f"no stride cuts {image_size} pixels into its {tokens} patches of {patch} px; give another --image-size"
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


def _view_of_arm(image_size: tuple[int, int]) -> EvaluationView:
    """ARM's evaluation makes images square; above 224 pixels it cuts nothing off."""
    return EvaluationView(resize="squash", crop=0.875 if max(image_size) <= _USUAL_SIDE else 1.0)


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
        assumed=(
            _NORMS,
            f"heads of the decoder are {HEAD_WIDTH} wide",
            "the decoder's norm2_1, norm2_2 and norm2 belong to the queries, the features and the MLP",
        ),
        view=_view_of_arm,
        computed=_computed_by_arm,
    ),
    Layout(
        name="ARM, fine-tuned",
        told_by="layers.0.mlp.w1.weight",
        names=_same("cls_token", *_TRUNK, *_SWIGLU, *_with_biases("norm_f", "head")),
        describe=_describe_arm,
        usual={"cls_token": "middle", "combine": "mean", "pool": "mean"},
        assumed=(_NORMS,),
        view=_view_of_arm,
    ),
    Layout(
        name="Vim",
        told_by="layers.0.mixer.A_b_log",
        names=_same("cls_token", *_TRUNK, "layers.*.norm.weight", "norm_f.weight", *_with_biases("head")),
        describe=_describe_vim,
        usual={"cls_token": "middle", "combine": "mean"},
        certain=False,
        assumed=(_NORMS,),
    ),
    Layout(
        name="EfficientViM",
        told_by="stages.0.blocks.0.mixer.hz_proj.conv.weight",
        describe=_describe_efficientvim,
        size="those of the project's model of these widths",
    ),
)


def _some(names: Mapping[str, Any]) -> str:
    listed = list(names)
    return ", ".join(listed[:3]) + (", ..." if len(listed) > 3 else "")
