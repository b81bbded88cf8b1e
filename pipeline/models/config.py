"""What a model is, as values. Nothing here imports torch, so a plan or a check of a config is quick.

`ModelConfig` is the config of one family, chosen by `name`: a name of ours, or `timm/NAME` for any model of timm. A variant
(`pipeline/models/variants.py`) gives the values of a named model; a config names one and overrides what differs.
"""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from pipeline.config import Strict, nearest
from pipeline.models.family import Depth, FamilyConfig, Ratio, Width
from pipeline.models.variants import (
    EFFICIENTVIM_VARIANTS,
    VISION_MAMBA_VARIANTS,
    VSSD_VARIANTS,
    WIDE_RESNET_VARIANTS,
)

TIMM_PREFIX = "timm/"
Option = Annotated[int, Field(ge=-(2**15), le=2**15)] | Annotated[float, Field(ge=-1e6, le=1e6)]
Options = Annotated[tuple[Option, ...], Field(max_length=16)]
_READING_OPTIONS = ("pretrained", "checkpoint_path", "cache_dir", "pretrained_cfg", "pretrained_cfg_overlay")


class SSMixupConfig(Strict):
    """SSMixup in a model: nu C h_mix is added to the two directions' outputs, h_mix = psi h_forward + (1 - psi) h_backward."""

    nu: Annotated[float, Field(ge=-1e6, le=1e6)] | Literal["learned"] = Field(
        "learned", description="strength of the term: a fixed number, or one learned for each block, starting at 0"
    )
    layers: Literal["all"] | Depth | tuple[Depth, ...] = Field(
        "all", description="blocks with the term: all, a number for that many last blocks, or a list counted from 1"
    )
    readout: Literal["own_C", "shared_C"] = Field(
        "own_C", description="C that reads the states: each direction's own, or the forward one's (an extra scan)"
    )
    everywhere: bool = Field(
        False, description="give images without a confidence the term too, with psi = 1/2; otherwise they have none"
    )

    def blocks(self, depth: int) -> set[int]:
        """Return the blocks of a model of `depth` blocks that have the term, counted from 1."""
        if self.layers == "all":
            return set(range(1, depth + 1))
        return set(range(depth - self.layers + 1, depth + 1) if isinstance(self.layers, int) else self.layers)


class VisionMambaConfig(FamilyConfig):
    """A Vision Mamba: Vim, ARM's backbone, Semi-ViM."""

    variants = VISION_MAMBA_VARIANTS

    patch_size: Width = Field(16, description="pixels on a side of a patch")
    stride: Width | None = Field(None, description="pixels from one patch to the next; null means patch_size")
    embed_dim: Width = Field(description="width of the tokens, in channels")
    depth: Depth = Field(description="number of blocks")
    d_state: Width = Field(16, description="N, states of the scan for each channel")
    d_conv: Width = Field(4, description="taps of the causal convolution before each scan, in tokens")
    expand: Depth = Field(2, description="inner width of the mixer divided by embed_dim")
    directions: Literal[1, 2, 4] = Field(
        2, description="1: along the rows; 2: also backwards; 4: also along the columns, both ways"
    )
    order: Literal["raster", "cluster"] = Field(
        "raster",
        description="order of the scan. In pretraining, where cluster is the default, it also decides what is predicted at"
        " once: a square cluster, or as many patches one after another along the rows",
    )
    cluster_size: Width = Field(64, description="pixels on a side of a cluster, ARM's unit of prediction")
    mlp: Literal["none", "swiglu"] = Field("none", description="layer after each mixer: none (Vim) or swiglu (ARM)")
    norm: Literal["rms", "layer"] = Field("rms", description="kind of norm: rms (Vim) or layer (ARM)")
    cls_token: Literal["middle", "first", "none"] = Field(
        "middle", description="where the cls token is among the patches: in the middle, before the first, or nowhere"
    )
    combine: Literal["mean", "sum"] = Field(
        "mean", description="how the outputs of the directions are put together; released models take their mean"
    )
    pool: Literal["cls", "mean"] = Field(
        "cls", description="what the head reads: the cls token, or the mean of the patches"
    )
    pos_embed: Literal["learned", "sincos"] = Field(
        "learned", description="position embedding: learned, or the fixed 2-D sin-cos table (pretraining)"
    )
    ssmixup: SSMixupConfig | None = Field(
        None, description="blending of opposite directions by confidence (Semi-ViM); null for none"
    )

    @model_validator(mode="after")
    def _geometry(self) -> Self:
        for side in self.image_size:
            if side < self.patch_size:
                raise ValueError(f"image_size {self.image_size} is below patch_size {self.patch_size}; raise it")
        if self.cls_token == "none" and self.pool == "cls":
            raise ValueError("pool=cls needs a cls token, cls_token=middle or first; set pool=mean")
        if self.order == "cluster":
            check_clusters(self)
        if self.ssmixup and self.directions == 1:
            raise ValueError("ssmixup blends opposite directions: it needs directions 2 or 4, not 1")
        if self.ssmixup and not self.ssmixup.blocks(self.depth) <= set(range(1, self.depth + 1)):
            raise ValueError(f"ssmixup.layers {self.ssmixup.layers} must lie in 1 to depth {self.depth}")
        if self.ssmixup and self.ssmixup.layers == ():
            raise ValueError('ssmixup.layers is empty, which mixes nothing: name blocks, a number of them, or "all"')
        return self

    @property
    def grid_size(self) -> tuple[int, int]:
        """Number of patches (rows, across)."""
        stride = self.stride or self.patch_size
        return (
            (self.image_size[0] - self.patch_size) // stride + 1,
            (self.image_size[1] - self.patch_size) // stride + 1,
        )


class DecoderConfig(Strict):
    """ARM's decoder, which pretraining puts on top of the backbone and then drops."""

    width: Width = Field(512, description="width of the decoder, in channels; a multiple of 4 x num_heads")
    depth: Depth = Field(4, description="number of cross-attention blocks")
    num_heads: Width = Field(8, description="heads of each cross-attention")
    mlp_ratio: Ratio = Field(4.0, description="hidden channels of each MLP divided by width")
    taps: tuple[Depth, ...] | None = Field(
        None,
        description="blocks of the backbone that the decoder reads, counted from 1; null means those at 1/2, 2/3, 5/6 and all"
        " of its depth",
    )

    @model_validator(mode="after")
    def _heads(self) -> Self:
        if self.width % (4 * self.num_heads):
            raise ValueError(f"decoder.width {self.width} must be a multiple of 4 x num_heads = {4 * self.num_heads}")
        return self


def default_taps(depth: int) -> tuple[int, ...]:
    """Return blocks 6, 8, 10, 12 of 12 and 12, 16, 20, 24 of 24 (ARM); for other depths the same fractions, rounded."""
    return tuple(sorted({max(1, round(depth * (3 + i) / 6)) for i in range(4)}))


def check_taps(decoder: DecoderConfig, model: VisionMambaConfig) -> None:
    """Check that the decoder's taps are blocks of the model, each once, in order.

    Raises:
        ValueError: They are not.
    """
    taps = decoder.taps or ()
    if taps and (max(taps) > model.depth or list(taps) != sorted(set(taps))):
        raise ValueError(
            f"decoder.taps {taps} must be in rising order, without repeats, and at most model.depth {model.depth}"
        )


def check_clusters(model: VisionMambaConfig) -> None:
    """Check that the grid of patches consists of whole clusters, two at least.

    Raises:
        ValueError: It does not.
    """
    if model.stride not in (None, model.patch_size):
        raise ValueError(
            f"clusters need patches that do not overlap; stride is {model.stride}, patch_size {model.patch_size}"
        )
    if model.cluster_size % model.patch_size:
        raise ValueError(f"cluster_size {model.cluster_size} must be a multiple of patch_size {model.patch_size}")
    if any(side % model.cluster_size for side in model.image_size):
        raise ValueError(f"image_size {model.image_size} must be a multiple of cluster_size {model.cluster_size}")
    if model.image_size == (model.cluster_size, model.cluster_size):
        raise ValueError(f"image_size {model.image_size} is a single cluster; lower cluster_size")


class EfficientViMConfig(FamilyConfig):
    """EfficientViM (CVPR 2025) and every ablation of its Table C."""

    variants = EFFICIENTVIM_VARIANTS

    widths: tuple[Width, Width, Width] = Field(description="channels of the three stages; multiples of 8")
    depths: tuple[Depth, Depth, Depth] = Field(description="blocks of the three stages")
    states: tuple[Width, Width, Width] = Field(description="N, hidden states of the three stages")
    stem_stride: Literal[4, 8, 16] = Field(
        16, description="image pixels on a side of a pixel of the first map; 16 is the published value"
    )
    mlp_ratio: Ratio = Field(4.0, description="hidden channels of each feed-forward divided by the width")
    expand: Depth = Field(1, description="inner width of the mixer divided by the width")
    mixer: Literal["hsm", "ncssd", "attention"] = Field(
        "hsm", description="token mixer: HSM-SSD, or an ablation of Table C (NC-SSD, attention)"
    )
    importance: Literal["state", "vector", "multihead"] = Field(
        "state",
        description="weights of a token: one for each state, one for all states, or one for each head (hsm only)",
    )
    heads: Width = Field(8, description="number of heads for importance=multihead")
    fusion: Literal["hidden", "map", "none"] = Field(
        "hidden",
        description="what the classifier reads beside the last map: the stages' hidden states, maps, or nothing",
    )
    norm: Literal["partial_ln", "bn"] = Field(
        "partial_ln", description="norm before the mixer and the heads; bn (batch norm) diverges in the paper"
    )
    distilled: bool = Field(
        False, description="add a second set of heads that learn from the teacher; logits are the average of both sets"
    )
    gate_init: float = Field(
        1e-4,
        ge=-1e3,
        le=1e3,
        description="first value of the gates before their sigmoid; the released 1e-4 halves every branch",
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if any(width % 8 for width in self.widths):
            raise ValueError(f"widths {self.widths} must be multiples of 8")
        if self.mixer != "hsm" and self.fusion == "hidden":
            raise ValueError(f"mixer={self.mixer} has no hidden states to fuse; set fusion=map or fusion=none")
        if self.mixer != "hsm" and self.importance != "state":
            raise ValueError(f"importance={self.importance} needs mixer=hsm, not {self.mixer}")
        if self.importance == "multihead" and any(width * self.expand % self.heads for width in self.widths):
            raise ValueError(f"widths {self.widths} must be multiples of heads {self.heads}")
        return self


class VSSDConfig(FamilyConfig):
    """VSSD: non-causal state space duality in stages 1 to 3, attention in stage 4."""

    variants = VSSD_VARIANTS

    width: Width = Field(description="channels of the first stage; each further stage has twice as many")
    depths: tuple[Depth, Depth, Depth, Depth] = Field(description="blocks of the four stages")
    heads: tuple[Width, Width, Width, Width] = Field(description="heads of the four stages")
    states: Width = Field(64, description="N, states of each head")
    expand: Depth = Field(2, description="inner width of the mixer divided by the stage's width")
    mlp_ratio: Ratio = Field(4.0, description="hidden channels of each MLP divided by the stage's width")
    mixer: Literal["ncssd", "hsm"] = Field(
        "ncssd", description="mixer of the first three stages: NC-SSD, or EfficientViM's HSM-SSD (its Table D)"
    )


class WideResNetConfig(FamilyConfig):
    """A wide residual network for small images: WRN-28-2 of the FixMatch family."""

    variants = WIDE_RESNET_VARIANTS

    depth: Depth = Field(description="layers with weights, 6 n + 4 for n blocks in each of the three stages")
    widen: Depth = Field(description="channels of the three stages, over 16, 32 and 64")

    @model_validator(mode="after")
    def _whole_blocks(self) -> Self:
        if self.depth < 10 or (self.depth - 4) % 6:
            raise ValueError(f"depth {self.depth} must be 6 n + 4, for example 10, 16, 22 or 28")
        return self


class TimmConfig(FamilyConfig):
    """Any model of timm, from scratch or from a file of weights: `name: timm/vit_small_patch16_224`."""

    options: dict[str, Annotated[str, Field(max_length=200)] | Option | bool | Options] = Field(
        {}, description="further arguments of timm's create_model, for example {global_pool: avg}; see docs/models.md"
    )

    @model_validator(mode="after")
    def _options(self) -> Self:
        if not re.fullmatch(r"timm/[A-Za-z0-9_.-]{1,100}", self.name):
            raise ValueError(f"{self.name[:60]!r} is no model of timm; write for example timm/resnet50")
        blocks = [self.options.get(key, 1) for key in ("depth", "depths", "layers")]
        if any(sum(map(float, n if isinstance(n, tuple) else (n,))) > 512 for n in blocks):
            raise ValueError("options.depth, options.depths or options.layers is above 512 blocks")
        if found := set(self.options).intersection(_READING_OPTIONS):
            raise ValueError(f"options.{min(found)} would read other files; give weights by their file instead")
        return self

    @classmethod
    def knows(cls, name: str) -> bool:
        """Whether `name` begins with `timm/`; timm itself is asked when the model is built."""
        return name.startswith(TIMM_PREFIX)

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `TimmModel`, which is told the name."""
        return dict(self)


FAMILIES: tuple[type[FamilyConfig], ...] = (
    VisionMambaConfig,
    EfficientViMConfig,
    VSSDConfig,
    WideResNetConfig,
    TimmConfig,
)


def family_of(name: str) -> type[FamilyConfig]:
    """Return the family that has a model of this name.

    Raises:
        ValueError: No family has; the sentence lists the known names, nearest first.
    """
    for family in FAMILIES:
        if family.knows(name):
            return family
    known = [variant for family in FAMILIES for variant in family.variants]
    raise ValueError(f"model name {name!r} is unknown; known: {', '.join(nearest(name, known))}, {TIMM_PREFIX}NAME")


def _tag(values: Any) -> str:
    family = type(values) if isinstance(values, FamilyConfig) else family_of(str(values["name"]))
    return f"tagged-{family.__name__}"


def _has_a_name(values: Any) -> Any:
    """Refuse a missing or unknown name before the union is resolved, which needs it."""
    if isinstance(values, dict) and "name" not in values:
        raise ValueError("name is missing: which model? For example name: vim_nano")
    if not isinstance(values, dict | FamilyConfig):
        raise ValueError(f"expected a mapping with a name, for example {{name: vim_nano}}, got {values!r}")
    if isinstance(values, dict):
        family_of(str(values["name"]))
    return values


ModelConfig = Annotated[
    Annotated[VisionMambaConfig, Tag("tagged-VisionMambaConfig")]
    | Annotated[EfficientViMConfig, Tag("tagged-EfficientViMConfig")]
    | Annotated[VSSDConfig, Tag("tagged-VSSDConfig")]
    | Annotated[WideResNetConfig, Tag("tagged-WideResNetConfig")]
    | Annotated[TimmConfig, Tag("tagged-TimmConfig")],
    Discriminator(_tag),
    BeforeValidator(_has_a_name),
]
