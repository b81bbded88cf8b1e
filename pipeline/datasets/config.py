"""How a folder of images is opened and how a dataset is split, as values (torch-free)."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from pipeline.config import Strict
from pipeline.decoding import MAX_PIXELS, add_max_pixels


@dataclass(frozen=True)
class Opening:
    """How folders of images without shards are opened; shards are what they are.

    Attributes:
        classes: File of class names, or a dataset, whose classes such a folder has; None = its class folders.
        max_pixels: The most pixels of an image; one that has more refuses the folder.
    """

    classes: Path | None = None
    max_pixels: int = MAX_PIXELS


def add_opening(parser: argparse.ArgumentParser) -> None:
    """Give a command the options --classes and --max-pixels, which `opening_of` reads."""
    add_classes(parser)
    add_max_pixels(parser)


def add_classes(parser: argparse.ArgumentParser) -> None:
    """Give a command that has --max-pixels already the option --classes."""
    parser.add_argument(
        "--classes",
        type=Path,
        metavar="FILE",
        help="classes of folders of images without shards, one a line, as data.classes; or a dataset, to have its classes",
    )


def opening_of(options: argparse.Namespace) -> Opening:
    """Return the choices of `add_opening`."""
    return Opening(options.classes, options.max_pixels or MAX_PIXELS)


class SplitConfig(Strict):
    """Which samples are labelled, unlabelled and held out for validation; papers leave most of these choices unsaid.

    Validation samples are taken first, then the imbalance is applied, then the labelled samples are chosen. Validation
    serves thresholds and the choice of models; a test set is a dataset of its own.
    """

    imbalance: float = Field(
        1.0,
        ge=1.0,
        le=1e9,
        description="samples of the largest class per sample of the smallest one; 1 = every sample is kept",
    )
    profile: Literal["exponential", "supplement"] = Field(
        "exponential",
        description="how class sizes fall: n_max * imbalance^(-rank/(classes-1)), or as the supplement of Semi-ViM words "
        "it for 10, 100 and 1000",
    )
    relative_to: Literal["largest", "own"] = Field(
        "largest", description="what n_max is: the size of the largest class, or each class's own size"
    )
    class_order: Literal["index", "frequency", "random"] = Field(
        "index", description="order of the classes from head to tail: by number, by size, or at random"
    )
    scope: Literal["both", "labelled"] = Field(
        "both",
        description="what is long-tailed: labelled and unlabelled samples; or the labelled ones only, so that all other "
        "samples are unlabelled",
    )
    ood_classes: int = Field(
        0,
        ge=0,
        le=10**6,
        description="how many classes, the last in class_order, are never labelled and never in validation",
    )
    ood_scope: Literal["all", "labelled"] = Field(
        "all", description="where the ood_classes are missing: everywhere, or among the labelled samples only"
    )
    labelled: float = Field(1.0, gt=0.0, le=1.0, description="fraction of each class that keeps its label")
    min_labelled_per_class: int = Field(1, ge=0, le=10**9, description="least number of labelled samples in each class")
    rounding: Literal["random", "nearest"] = Field(
        "random",
        description="how counts are rounded: at random so that the mean is kept (seeded per class), or to the nearest",
    )
    validation_per_class: int = Field(
        0, ge=0, le=10**9, description="samples of each class that are held out for validation"
    )
    labelled_list: str = Field(
        "",
        description="file that names exactly the labelled samples, one a line, such as ImageNet's published 1 % and 10 %",
    )
    pool_list: str = Field(
        "",
        description="file that names all samples that may be used, one a line, such as ImageNet-LT's; others are unused",
    )

    n_1: int = Field(
        0,
        ge=0,
        le=10**9,
        description="USB's long-tail protocol: labelled samples of the first class; 0 = the other options decide",
    )
    m_1: int = Field(
        0,
        ge=0,
        le=10**9,
        description="USB's protocol: unlabelled samples of the first class (of the last, if gamma_u is negative); 0 = all that"
        " are left, in every class",
    )
    gamma_l: float = Field(1.0, ge=1, le=1e9, description="USB's protocol: imbalance of the labelled samples")
    gamma_u: float = Field(
        1.0,
        ge=-1e9,
        le=1e9,
        description="USB's protocol: imbalance of the unlabelled samples; negative = in the reversed order of the classes",
    )

    @model_validator(mode="after")
    def _usb_stands_alone(self) -> "SplitConfig":
        if not self.n_1:
            if self.m_1 or self.gamma_l != 1 or self.gamma_u != 1:
                raise ValueError("m_1, gamma_l and gamma_u belong to USB's protocol; give n_1 too")
            return self
        defaults = SplitConfig()
        for name in SplitConfig.model_fields:
            usb = name in ("n_1", "m_1", "gamma_l", "gamma_u", "validation_per_class")
            if not usb and getattr(self, name) != getattr(defaults, name):
                raise ValueError(f"n_1 stands for USB's protocol, which has no {name}; leave out one of the two")
        if abs(self.gamma_u) < 1:
            raise ValueError(f"gamma_u {self.gamma_u:g} must be 1 or more, or -1 or less")
        if self.gamma_u != 1 and not self.m_1:
            raise ValueError("gamma_u needs m_1, the unlabelled samples of the first class")
        return self

    @model_validator(mode="after")
    def _lists_stand_alone(self) -> "SplitConfig":
        if self.labelled_list and (self.imbalance > 1 or self.labelled < 1 or self.ood_classes):
            raise ValueError(
                "labelled_list already says which samples are labelled; leave out imbalance, labelled and ood_classes"
            )
        if self.profile == "supplement" and self.imbalance not in (1, 10, 100, 1000):
            raise ValueError(f"profile = supplement describes imbalance 10, 100 and 1000, not {self.imbalance:g}")
        return self
