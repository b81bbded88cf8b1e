"""What a config file may say about streaming.

The module imports nothing heavy: a misspelt key is refused before torch is loaded.
"""

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.config import Strict
from pipeline.identity import FREE
from pipeline.storage.config import RemoteConfig

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(gt=0, le=10**9)]
Few = Annotated[int, Field(gt=0, le=1024)]


# What timm's rand_augment_transform takes. Its own check is an assertion, and it ignores a section without a number.
_RAND_AUGMENT = re.compile(
    r"rand(-(m(\d|10)|n\d|mstd\d{1,3}(\.\d{1,6})?|mmax\d{1,2}|p(0|1|0?\.\d{1,6}|[01]\.\d{1,6})|inc[01]))*"
)


class AffineConfig(Strict):
    """A random affine map of a training view about its centre: shear, scale, rotation and translation, drawn uniformly.

    The scale is drawn uniformly in its logarithm.
    """

    rotation: float = Field(0.0, ge=0.0, le=180.0, description="largest rotation to either side, in degrees")
    scale: tuple[float, float] = Field((1.0, 1.0), description="least and largest factor by which the content grows")
    shear: float = Field(0.0, ge=0.0, le=60.0, description="largest shear along each axis to either side, in degrees")
    translation: Fraction = Field(
        0.0, description="largest shift along each axis to either side, as a fraction of the view's side"
    )
    chance: Fraction = Field(1.0, description="probability that a view is mapped at all")
    fill: Literal["border", "mean"] = Field(
        "border",
        description="colour of what lies outside the image: the median of the image's outermost pixels, or data.mean",
    )

    @model_validator(mode="after")
    def _scale_rises(self) -> "AffineConfig":
        low, high = self.scale
        if not 0.1 <= low <= high <= 10:
            raise ValueError(f"scale = {self.scale}: give 0.1 <= smallest <= largest <= 10")
        return self


class AugmentConfig(Strict):
    """Augmentation of one training view, applied in the order of the fields."""

    crop_scale: tuple[float, float] = Field(
        (0.08, 1.0), description="least and largest area of the random crop, as a fraction of the image's"
    )
    crop_ratio: tuple[float, float] = Field(
        (3 / 4, 4 / 3), description="least and largest width / height of the random crop"
    )
    interpolation: Literal["bilinear", "bicubic"] = Field(
        "bicubic", description="how pixels are interpolated when the crop is resized"
    )
    affine: AffineConfig | None = Field(
        None,
        description="random rotation, scale, shear and translation of the crop, which read the image beyond the crop's edges;"
        " null = off",
    )
    horizontal_flip: Fraction = Field(0.5, description="probability of a horizontal flip")
    color_jitter: float = Field(
        0.0,
        ge=0.0,
        le=10.0,
        description="strength s: brightness, contrast and saturation change by a factor in 1 ± s; 0 = off",
    )
    rand_augment: str = Field(
        "", description="RandAugment in timm's notation, such as rand-m9-mstd0.5-inc1; empty = off"
    )
    erase: Fraction = Field(0.0, description="probability that one random rectangle is erased")
    erase_fill: Literal["mean", "noise"] = Field(
        "noise", description="what an erased rectangle is filled with: the mean colour, or noise about it"
    )

    @model_validator(mode="after")
    def _ranges_rise(self) -> "AugmentConfig":
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop_scale = {self.crop_scale}: give 0 < smallest <= largest <= 1")
        low, high = self.crop_ratio
        if not 0 < low <= high:
            raise ValueError(f"crop_ratio = {self.crop_ratio}: give 0 < smallest <= largest")
        if self.rand_augment and not _RAND_AUGMENT.fullmatch(self.rand_augment):
            raise ValueError(
                f"rand_augment = {self.rand_augment[:40]!r} is not in timm's notation: write rand and then sections of a name"
                " and a number, m (magnitude, 0 to 10), n (operations), mstd, mmax, p (probability) or inc (0 or 1), as in"
                " rand-m9-mstd0.5-inc1"
            )
        return self


# Semi-ViT's two views of an unlabelled image (its released settings).
WEAK = AugmentConfig(color_jitter=0.4)
STRONG = AugmentConfig(rand_augment="rand-m9-mstd0.5-inc1", erase=0.25)


class LoaderConfig(Strict):
    """How the samples of a stream are ordered, read and decoded."""

    virtual_readers: Positive | None = Field(
        None,
        description="number of equal shares into which the order of the samples is cut; each process owns whole shares. "
        "null = derived, so that every number of processes that divides loop.global_batch fits if there are enough "
        "samples. A given number must divide loop.global_batch and be a multiple of the number of processes",
    )
    window: Positive = Field(
        32_768, description="how far the shuffle moves a sample at most, in samples over all virtual readers"
    )
    workers: int = Field(
        2,
        ge=0,
        le=1024,
        description="processes per rank that read and decode; 0 = the training process does it itself",
        json_schema_extra=FREE,
    )
    prefetch: Few = Field(2, description="batches that each worker makes ahead", json_schema_extra=FREE)
    sampling: Literal["uniform", "class_balanced", "repeat_factor"] = Field(
        "uniform",
        description="how often labelled samples appear: each once an epoch; every class equally often; or rare classes "
        "repeated as in LVIS. Unlabelled streams are always uniform",
    )
    repeat_threshold: float = Field(
        0.001,
        gt=0.0,
        le=1.0,
        description="repeat_factor: classes with less than this share of the samples are repeated",
    )
    max_unreadable: Fraction = Field(
        0.001,
        description="share of the samples that may fail to decode before the run ends; those are replaced and named in "
        "quarantine.jsonl",
    )
    remote: RemoteConfig = Field(
        RemoteConfig(), description="how shards behind http(s), s3, gs or az are fetched", json_schema_extra=FREE
    )


def derive_virtual_readers(global_batch: int, samples: int, *, mixed: bool = False) -> int:
    """Choose into how many virtual readers the order of a run is cut.

    The result is the largest divisor of `global_batch` that leaves every virtual reader at least one sample of the stream
    and, with `mixed`, at least two images of each batch, since partners are found inside a virtual reader. Usually it is
    `global_batch` itself, or half of it with `mixed`.

    A process owns whole virtual readers, so every number of processes that divides the result serves the same global
    batches. The rule knows the batch and the data but not the number of processes. So a run that is resumed with more
    or fewer processes has the same virtual readers, and with them the same order and the same mixed pairs.

    Args:
        global_batch: Samples per optimizer step over all processes.
        samples: Samples of the smallest stream of the run.
        mixed: Whether a stream with `global_batch` images per step mixes them in pairs.

    Returns:
        The number of virtual readers, at least 1.
    """
    most = min(samples, global_batch // 2 if mixed else global_batch)
    return max((d for d in range(1, most + 1) if global_batch % d == 0), default=1)
