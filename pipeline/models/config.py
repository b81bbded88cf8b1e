"""What a model is, as values: no torch here, so that a plan or a refusal costs nothing.

`VARIANTS` of a family give the values of a named model; a config names one and overrides what differs.
"""

from typing import Any, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from pipeline.config import Strict, nearest

VISION_MAMBA_VARIANTS: dict[str, dict[str, Any]] = {
    # Vision Mamba as released: RMSNorm, expand 2, no MLP, two directions, cls in the middle.
    "vim_tiny": {"embed_dim": 192, "depth": 24},
    "vim_small": {"embed_dim": 384, "depth": 24},
    "vim_base": {"embed_dim": 768, "depth": 24},
    # ARM in its fine-tuning form: LayerNorm, expand 1, SwiGLU, four directions, mean of the patches.
    "arm_base": {"embed_dim": 768, "depth": 12, "_arm": True},
    "arm_large": {"embed_dim": 1024, "depth": 24, "_arm": True},
    "arm_huge": {"embed_dim": 1536, "depth": 24, "_arm": True},
    # Semi-ViM states only "146 M" for Base. Vim at 768 x 36 has 145.6 M: an inference, as are the two below it.
    "semivim_tiny": {"embed_dim": 192, "depth": 24},
    "semivim_small": {"embed_dim": 384, "depth": 24},
    "semivim_base": {"embed_dim": 768, "depth": 36},
    # Ours: a laptop's CPU trains it in seconds.
    "vim_nano": {"embed_dim": 64, "depth": 4, "d_state": 8, "image_size": (32, 32), "patch_size": 4, "cluster_size": 8},
}
_ARM = {"expand": 1, "norm": "layer", "mlp": "swiglu", "directions": 4, "pool": "mean"}


# ARM pretrains a backbone in this form. What fine-tuning builds anew: a classifier, a final norm and a cls token.
PRETRAINING_FORM: dict[str, Any] = {
    "directions": 1,
    "order": "cluster",
    "cls_token": "none",
    "pool": "mean",
    "pos_embed": "sincos",
    "num_classes": 0,
    "drop_path": 0.0,
}


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


class VisionMambaConfig(Strict):
    """A Vision Mamba. Fields left out take the value of the variant `name`, then the default below."""

    name: str
    image_size: tuple[PositiveInt, PositiveInt] = Field(
        (224, 224), description="(height, width) in pixels; a number means square"
    )
    patch_size: PositiveInt = Field(16, description="pixels")
    stride: PositiveInt | None = Field(None, description="pixels between patches; none = patch_size")
    in_chans: PositiveInt = 3
    embed_dim: PositiveInt
    depth: PositiveInt
    d_state: PositiveInt = Field(16, description="N, states a channel")
    d_conv: PositiveInt = 4
    expand: PositiveInt = Field(2, description="inner width / embed_dim")
    directions: Literal[1, 2, 4] = 2
    order: Literal["raster", "cluster"] = Field("raster", description="order in which the tokens are scanned")
    cluster_size: PositiveInt = Field(64, description="pixels a side of a cluster (ARM's unit of prediction)")
    mlp: Literal["none", "swiglu"] = "none"
    norm: Literal["rms", "layer"] = "rms"
    cls_token: Literal["middle", "none"] = "middle"
    pool: Literal["cls", "mean"] = Field(
        "cls", description="what the head reads: the cls token, or the mean of the patches"
    )
    pos_embed: Literal["learned", "sincos"] = "learned"
    drop_path: float = Field(0.0, ge=0, lt=1)
    num_classes: int = Field(1000, ge=0)
    ssmixup: SSMixupConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def _fill_from_variant(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        values = dict(values)
        name = values.get("name")
        if name in VISION_MAMBA_VARIANTS:
            variant = VISION_MAMBA_VARIANTS[name]
            arm = _ARM if "_arm" in variant else {}
            values = {**arm, **{k: v for k, v in variant.items() if k != "_arm"}, **values}
        elif name is not None:
            known = nearest(str(name), list(VISION_MAMBA_VARIANTS))
            raise ValueError(f"model name {name!r} is unknown; known: {', '.join(known)}")
        if isinstance(values.get("image_size"), int):
            values["image_size"] = (values["image_size"], values["image_size"])
        return values

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
