"""What a model is, as values: no torch here, so that a plan or a refusal costs nothing.

`ModelConfig` is one family's config, chosen by `name`: a name of ours, or `timm/NAME` for any model of timm. The variants of
a family give the values of a named model; a config names one and overrides what differs.
"""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, PositiveInt, Tag, model_validator

from pipeline.config import Strict, nearest

_ARM = {"expand": 1, "norm": "layer", "mlp": "swiglu", "directions": 4, "pool": "mean"}

VISION_MAMBA_VARIANTS: dict[str, dict[str, Any]] = {
    # Vision Mamba as released: RMSNorm, expand 2, no MLP, two directions, cls in the middle.
    "vim_tiny": {"embed_dim": 192, "depth": 24},
    "vim_small": {"embed_dim": 384, "depth": 24},
    "vim_base": {"embed_dim": 768, "depth": 24},
    # ARM in its fine-tuning form: LayerNorm, expand 1, SwiGLU, four directions, mean of the patches.
    "arm_base": {"embed_dim": 768, "depth": 12, **_ARM},
    "arm_large": {"embed_dim": 1024, "depth": 24, **_ARM},
    "arm_huge": {"embed_dim": 1536, "depth": 24, **_ARM},
    # Semi-ViM states only "146 M" for Base. Vim at 768 x 36 has 145.6 M: an inference, as are the two below it.
    "semivim_tiny": {"embed_dim": 192, "depth": 24},
    "semivim_small": {"embed_dim": 384, "depth": 24},
    "semivim_base": {"embed_dim": 768, "depth": 36},
    # Ours: a laptop's CPU trains it in seconds.
    "vim_nano": {"embed_dim": 64, "depth": 4, "d_state": 8, "image_size": (32, 32), "patch_size": 4, "cluster_size": 8},
}

# ARM pretrains a backbone in this form. What fine-tuning builds anew: a classifier, a final norm and a cls token.
PRETRAINING_FORM: dict[str, Any] = {
    "directions": 1,
    "cls_token": "none",
    "pool": "mean",
    "pos_embed": "sincos",
    "num_classes": 0,
    "drop_path": 0.0,
}


class FamilyConfig(Strict):
    """What every model says of itself. Fields left out take the value of the variant `name`, then their default."""

    variants: ClassVar[dict[str, dict[str, Any]]] = {}
    # Fields that may differ between a classifier's export and the model that starts from it; the weights follow.
    free: ClassVar[tuple[str, ...]] = ("name", "image_size", "drop_path", "num_classes")

    name: str
    image_size: tuple[PositiveInt, PositiveInt] = Field(
        (224, 224), description="(height, width) in pixels; a number means square"
    )
    in_chans: PositiveInt = 3
    drop_path: float = Field(0.0, ge=0, lt=1)
    num_classes: int = Field(1000, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _fill_from_variant(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        name = values.get("name")
        if name is not None and not cls.knows(str(name)):
            elsewhere = any(family.knows(str(name)) for family in FAMILIES)
            raise ValueError(
                f"model name {name!r} is {'of a family that is not taken here' if elsewhere else 'unknown'}; known:"
                f" {', '.join(nearest(str(name), list(cls.variants)))}"
            )
        values = {**cls.variants.get(str(name), {}), **values}
        if isinstance(values.get("image_size"), int):
            values["image_size"] = (values["image_size"], values["image_size"])
        return values

    @classmethod
    def knows(cls, name: str) -> bool:
        return name in cls.variants


class SSMixupConfig(Strict):
    """SSMixup's part in a model: nu C h_mix beside the two directions' outputs, h_mix = psi h_forward + (1 - psi) h_backward."""

    nu: float | Literal["learned"] = Field("learned", description="learned: one a block, from 0 on; or a fixed number")
    layers: Literal["all"] | PositiveInt | tuple[PositiveInt, ...] = Field(
        "all", description="all blocks, the last so many, or blocks counted from 1"
    )
    readout: Literal["own_C", "shared_C"] = Field(
        "own_C", description="own_C: each direction's own C, no extra scan; shared_C: the forward one's, one extra scan"
    )
    everywhere: bool = Field(
        False, description="part of the model: psi = 1/2 where no confidence is given; else only where one is given"
    )

    def blocks(self, depth: int) -> set[int]:
        """Blocks, counted from 1, that have the term."""
        if self.layers == "all":
            return set(range(1, depth + 1))
        return set(range(depth - self.layers + 1, depth + 1) if isinstance(self.layers, int) else self.layers)


class VisionMambaConfig(FamilyConfig):
    """A Vision Mamba."""

    variants = VISION_MAMBA_VARIANTS

    patch_size: PositiveInt = Field(16, description="pixels")
    stride: PositiveInt | None = Field(None, description="pixels between patches; none = patch_size")
    embed_dim: PositiveInt
    depth: PositiveInt
    d_state: PositiveInt = Field(16, description="N, states a channel")
    d_conv: PositiveInt = 4
    expand: PositiveInt = Field(2, description="inner width / embed_dim")
    directions: Literal[1, 2, 4] = 2
    order: Literal["raster", "cluster"] = Field(
        "raster",
        description="order of the scan. In pretraining (where cluster is the default) it also says what is predicted at once:"
        " a square cluster, or as many patches one after another along the rows",
    )
    cluster_size: PositiveInt = Field(64, description="pixels a side of a cluster (ARM's unit of prediction)")
    mlp: Literal["none", "swiglu"] = "none"
    norm: Literal["rms", "layer"] = "rms"
    cls_token: Literal["middle", "none"] = "middle"
    pool: Literal["cls", "mean"] = Field(
        "cls", description="what the head reads: the cls token, or the mean of the patches"
    )
    pos_embed: Literal["learned", "sincos"] = "learned"
    ssmixup: SSMixupConfig | None = None

    @model_validator(mode="after")
    def _geometry(self) -> Self:
        for side in self.image_size:
            if side < self.patch_size:
                raise ValueError(f"image_size {self.image_size} is smaller than patch_size {self.patch_size}")
        if self.cls_token == "none" and self.pool == "cls":
            raise ValueError("pool=cls needs cls_token=middle; set pool=mean")
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
        """Patches (down, across)."""
        stride = self.stride or self.patch_size
        return (
            (self.image_size[0] - self.patch_size) // stride + 1,
            (self.image_size[1] - self.patch_size) // stride + 1,
        )


class DecoderConfig(Strict):
    """ARM's decoder and target."""

    width: PositiveInt = 512
    depth: PositiveInt = 4
    num_heads: PositiveInt = 8
    mlp_ratio: float = Field(4.0, gt=0)
    taps: tuple[PositiveInt, ...] | None = Field(
        None, description="blocks read, counted from 1; none = 1/2, 2/3, 5/6, 1 of the depth"
    )

    @model_validator(mode="after")
    def _heads(self) -> Self:
        if self.width % (4 * self.num_heads):
            raise ValueError(f"decoder.width {self.width} must be a multiple of 4 x num_heads = {4 * self.num_heads}")
        return self


def default_taps(depth: int) -> tuple[int, ...]:
    """Blocks 6, 8, 10, 12 of 12 and 12, 16, 20, 24 of 24 (ARM); for other depths the same fractions, rounded."""
    return tuple(sorted({max(1, round(depth * (3 + i) / 6)) for i in range(4)}))


def check_taps(decoder: DecoderConfig, model: VisionMambaConfig) -> None:
    """Raises ValueError unless the decoder's taps are blocks of the model, each once, in order."""
    taps = decoder.taps or ()
    if taps and (max(taps) > model.depth or list(taps) != sorted(set(taps))):
        raise ValueError(f"decoder.taps {taps} must rise and end at model.depth {model.depth} at most")


def check_clusters(model: VisionMambaConfig) -> None:
    """Raises ValueError unless the grid of patches is a whole number (two at least) of whole clusters."""
    if model.stride not in (None, model.patch_size):
        raise ValueError(
            f"clusters need patches that do not overlap; stride is {model.stride}, patch_size {model.patch_size}"
        )
    if model.cluster_size % model.patch_size:
        raise ValueError(f"cluster_size {model.cluster_size} must be a multiple of patch_size {model.patch_size}")
    if any(side % model.cluster_size for side in model.image_size):
        raise ValueError(f"image_size {model.image_size} must be a multiple of cluster_size {model.cluster_size}")
    if model.image_size == (model.cluster_size, model.cluster_size):
        raise ValueError(f"image_size {model.image_size} is a single cluster; there is nothing to predict from")


def _efficientvim(
    widths: tuple[int, ...], depths: tuple[int, ...], states: tuple[int, ...], size: int
) -> dict[str, Any]:
    return {"widths": widths, "depths": depths, "states": states, "image_size": (size, size)}


EFFICIENTVIM_VARIANTS: dict[str, dict[str, Any]] = {
    "efficientvim_m1": _efficientvim((128, 192, 320), (2, 2, 2), (49, 25, 9), 224),
    "efficientvim_m2": _efficientvim((128, 256, 512), (2, 2, 2), (49, 25, 9), 224),
    "efficientvim_m3": _efficientvim((224, 320, 512), (2, 2, 2), (49, 25, 9), 224),
    "efficientvim_m4": _efficientvim((224, 320, 512), (3, 4, 2), (64, 32, 16), 256),
    # Ours, for the bundled digits: at 32 px the maps are 8, 4 and 2 a side, so the stem halves twice instead of four times.
    "efficientvim_nano": {**_efficientvim((32, 48, 64), (1, 2, 1), (16, 9, 4), 32), "stem_stride": 4},
}
EFFICIENTVIM_VARIANTS |= {f"{name}_dist": {**v, "distilled": True} for name, v in EFFICIENTVIM_VARIANTS.items()}


class EfficientViMConfig(FamilyConfig):
    """EfficientViM (CVPR 2025) and every ablation of its Table C."""

    variants = EFFICIENTVIM_VARIANTS

    widths: tuple[PositiveInt, PositiveInt, PositiveInt] = Field(
        description="channels of the three stages; multiples of 8"
    )
    depths: tuple[PositiveInt, PositiveInt, PositiveInt] = Field(description="blocks of the three stages")
    states: tuple[PositiveInt, PositiveInt, PositiveInt] = Field(description="N, hidden states of the three stages")
    stem_stride: Literal[4, 8, 16] = Field(16, description="pixels a side of the first map's cells; 16 = as published")
    mlp_ratio: float = Field(4.0, gt=0)
    expand: PositiveInt = Field(1, description="inner width of the mixer / width")
    mixer: Literal["hsm", "ncssd", "attention"] = "hsm"
    importance: Literal["state", "vector", "multihead"] = Field(
        "state", description="a token's weight: for each state, one for all, or one a head (hsm only)"
    )
    heads: PositiveInt = Field(8, description="of importance=multihead")
    fusion: Literal["hidden", "map", "none"] = Field(
        "hidden", description="what the classifier reads beside the last map: hidden states, maps, nothing"
    )
    norm: Literal["partial_ln", "bn"] = Field(
        "partial_ln", description="before the mixer and the heads; bn diverges in the paper"
    )
    distilled: bool = Field(
        False, description="a second set of heads, which the teacher teaches; answers are the average"
    )
    gate_init: float = Field(1e-4, description="before the sigmoid: 1e-4 halves every branch, as released")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if any(width % 8 for width in self.widths):
            raise ValueError(f"widths {self.widths} must be multiples of 8")
        if self.mixer != "hsm" and self.fusion == "hidden":
            raise ValueError(f"mixer={self.mixer} has no hidden states to fuse; set fusion=map or fusion=none")
        if self.mixer != "hsm" and self.importance != "state":
            raise ValueError(f"importance={self.importance} is of mixer=hsm, not of {self.mixer}")
        if self.importance == "multihead" and any(width * self.expand % self.heads for width in self.widths):
            raise ValueError(f"widths {self.widths} must be multiples of heads {self.heads}")
        return self


VSSD_VARIANTS: dict[str, dict[str, Any]] = {
    "vssd_micro": {"width": 48, "depths": (2, 2, 8, 4), "heads": (2, 4, 8, 16), "states": 48},
    "vssd_tiny": {"width": 64, "depths": (2, 4, 8, 4), "heads": (2, 4, 8, 16)},
    "vssd_small": {"width": 64, "depths": (3, 4, 21, 5), "heads": (2, 4, 8, 16)},
    "vssd_base": {"width": 96, "depths": (3, 4, 21, 5), "heads": (3, 6, 12, 24)},
    # Table D of EfficientViM: its mixer in place of NC-SSD in the first three stages.
    "vssd_tiny_hsm": {"width": 64, "depths": (2, 4, 8, 4), "heads": (2, 4, 8, 16), "mixer": "hsm"},
}


class VSSDConfig(FamilyConfig):
    """VSSD: non-causal state space duality in stages 1 to 3, attention in stage 4."""

    variants = VSSD_VARIANTS

    width: PositiveInt = Field(description="channels of the first stage; they double from stage to stage")
    depths: tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt]
    heads: tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt]
    states: PositiveInt = Field(64, description="N, states of a head")
    expand: PositiveInt = Field(2, description="inner width of the mixer / width")
    mlp_ratio: float = Field(4.0, gt=0)
    mixer: Literal["ncssd", "hsm"] = "ncssd"


TIMM_PREFIX = "timm/"


class TimmConfig(FamilyConfig):
    """Any model of timm, from scratch or from a file of weights: `name: timm/vit_small_patch16_224`."""

    options: dict[str, str | int | float | bool] = Field(
        default_factory=dict, description="further arguments of timm's create_model, for example {global_pool: avg}"
    )

    @classmethod
    def knows(cls, name: str) -> bool:
        return name.startswith(TIMM_PREFIX)


FAMILIES: tuple[type[FamilyConfig], ...] = (VisionMambaConfig, EfficientViMConfig, VSSDConfig, TimmConfig)


def family_of(name: str) -> type[FamilyConfig]:
    """The family that knows the name. Raises ValueError that lists the nearest known names."""
    for family in FAMILIES:
        if family.knows(name):
            return family
    known = [variant for family in FAMILIES for variant in family.variants]
    raise ValueError(f"model name {name!r} is unknown; known: {', '.join(nearest(name, known))}, {TIMM_PREFIX}NAME")


def _tag(values: Any) -> str:
    family = type(values) if isinstance(values, FamilyConfig) else family_of(str(values["name"]))
    return f"tagged-{family.__name__}"


def _has_a_name(values: Any) -> Any:
    """Before the choice, which can only be made by name."""
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
    | Annotated[TimmConfig, Tag("tagged-TimmConfig")],
    Discriminator(_tag),
    BeforeValidator(_has_a_name),
]
