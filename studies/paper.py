"""What the Semi-ViM paper and its README report, row by row, and the settings that each row is run with on ImageNet.

Semi-ViM publishes no hyper-parameter for ImageNet, except tau for ImageNet-LT in the supplement; the defaults of its code
are for CIFAR. Semi-ViT's settings (Cai et al. 2022, released commands) are known for Base and Huge at 1 and 10 %. Our
choice: Semi-ViM's rows, and every model and share that Semi-ViT does not name, run with Semi-ViT's settings for ViT-Base at
the nearest share.

So a pair of Table 4 differs in its backbone, in the weights that it starts from, and in SSMixup. SSMixup mixes directions,
and works beside Semi-ViT's mixup of the images.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.datasets.config import SplitConfig
from pipeline.datasets.imbalance import target_counts

TRAIN_IMAGES, CLASSES, LARGEST = 1_281_167, 1000, 1300
LT_IMAGES, LT_RAREST, LT_POWER = 115_846, 5, 6  # ImageNet-LT: images, images of the rarest class, Pareto's exponent
SHARES = {"0.1pct": "0.001", "1pct": "0.01", "5pct": "0.05", "10pct": "0.1", "50pct": "0.5"}
PLAIN_EMA = "ema={mode: ema, base_decay: 0.9999, warmup_steps: 0}"  # Semi-ViT's
# The same decay, with our values for what LyapEMA adds. The horizon of that decay is 10,000 steps: gamma is one over it,
# and the radius is equal to it.
LYAPEMA = (
    "ema={mode: guarded, base_decay: 0.9999, warmup_steps: 0, gamma: 0.0001, max_decay: 0.99999, radius_steps: 10000}"
)
FOOTNOTES = {
    "a": "more than ARM-Huge reaches with all labels (85.0 top-1), or for Tiny than Vim-Tiny with all (76.1); unverified",
    "b": "confidence weighting is worth 9.37 points, a fixed psi 0.02: no mechanism in the text explains it",
    "c": 'the column is headed "AP" and called training AP; tau was tuned on it. Ours is chosen on the validation subset',
    "d": "above the ceiling of 51.4 % that the stated protocol leaves without at least one label a class (ours keeps one)",
    "e": "the README calls the gain over this row 6.2 points; by its own table it is 7.4 (1 %) and 3.9 (10 %)",
    "f": "the paper does not delimit head and tail, and no one share of head classes fits all its rows; ours are thirds",
    "g": "the text quotes Small rows at IF 1000 and a tail of 1.73 and 17.81 %, which the table does not have",
    "h": "what is unlabelled is not stated; ours is the rest of ImageNet-LT",
    "i": "ours is of the 990 classes trained on; whether the paper counts the ten removed ones is not stated",
}


class Row(NamedTuple):
    """One row of a table of the paper."""

    name: str
    model: str
    share: str  # share of the labels, a key of SHARES
    values: Sequence[str]  # overrides of stage 3, on any dataset
    reported: str  # top-1, or top-1/head/tail, percent
    notes: str = ""
    imbalance: int = 1
    long_tailed: bool = False  # ImageNet-LT in place of ImageNet-1k

    @property
    def split(self) -> list[str]:
        """The options that `python -m pipeline.data split` gets."""
        made = ["--imbalance", str(self.imbalance)] if self.imbalance > 1 else []
        outside = ["--ood-classes", str(self.outside)] if self.outside else []
        return [*made, "--labelled", SHARES[self.share], *outside]

    @property
    def outside(self) -> int:
        """The number of classes that are only in the test set."""
        return 10 if self.imbalance == 1000 else 0

    @property
    def pool(self) -> str:
        """A name for the data and the split; rows with the same model and pool share their stage 2."""
        return ("lt-" if self.long_tailed else f"if{self.imbalance}-" if self.imbalance > 1 else "") + self.share

    def images(self) -> tuple[int, int]:
        """Estimate the labelled and unlabelled images of ImageNet, after validation, with at least one label per class."""
        if self.long_tailed:
            sizes = long_tail() - 1
        else:
            available = np.full(CLASSES, LARGEST if self.imbalance > 1 else TRAIN_IMAGES / CLASSES) - 10
            sizes = target_counts(available, np.arange(CLASSES), SplitConfig(imbalance=self.imbalance))
        sizes = sizes[: CLASSES - self.outside]
        labelled = round(np.maximum(1, float(SHARES[self.share]) * sizes).sum())
        return labelled, round(sizes.sum()) - labelled


def long_tail() -> NDArray[np.float64]:
    """Estimate the images of each class of ImageNet-LT, rarest class first.

    Returns:
        (C,) quantiles of a Pareto distribution, scaled to the known rarest class and the known sum.
    """
    above = ((np.arange(CLASSES) + 1) / (CLASSES + 1)) ** (-1 / LT_POWER) - 1
    return LT_RAREST + (LT_IMAGES - LT_RAREST * CLASSES) * above / above.sum()


def rows() -> Iterator[Row]:
    """Yield the rows of Tables 1 to 4 of the supplement, then those of the README."""
    mixing = {
        "none": ("null", "72.53 79.90"),
        "confidence": ("{}", "81.90 85.40"),
        "fixed": ("{psi: fixed}", "72.55 81.17"),
    }
    for name, (value, numbers) in mixing.items():
        for share, number in zip(("1pct", "10pct"), numbers.split(), strict=True):
            notes = "b" if name != "none" and share == "1pct" else "a" if number == "85.40" else ""
            yield Row(f"T1-{name}-{share}", "semivim_base", share, [LYAPEMA, f"ssmixup={value}"], number, notes)
    averages = {"ema": PLAIN_EMA, "lyapema": LYAPEMA}
    table_2 = {"tiny": "35.24 42.18 82.31 83.75", "small": "38.47 46.30 86.12 87.28", "base": "41.92 49.81 88.04 89.37"}
    for size, numbers in table_2.items():
        for k, number in enumerate(numbers.split()):
            share, average = ("0.1pct", "50pct")[k // 2], ("ema", "lyapema")[k % 2]
            values = [averages[average], "ssmixup={}"]
            notes = "a" if share == "50pct" else ""
            yield Row(f"T2-{size}-{share}-{average}", f"semivim_{size}", share, values, number, notes)
    table_3 = {
        "1pct": "62.45 63.78 64.92 65.50 65.98 66.30 66.15 65.80 65.42",
        "5pct": "71.32 72.18 73.45 74.10 74.85 75.10 75.52 74.90 74.50",
        "10pct": "75.20 76.05 76.80 77.05 77.20 77.40 77.25 76.85 76.50",
    }
    for share, numbers in table_3.items():
        for k, number in enumerate(numbers.split()):
            tau = f"{0.5 + 0.05 * k:.2f}"
            values = [LYAPEMA, "ssmixup={}", f"pseudo.threshold={tau}"]
            yield Row(f"T3-{share}-{tau}", "semivim_base", share, values, number, "ch", long_tailed=True)
    table_4 = {  # top-1/head/tail of ViT without and with LyapEMA, ViM without and with
        ("small", 10, "1pct"): "55.82/70.15/22.31 60.47/74.32/30.84 63.05/76.91/35.64 67.42/80.02/41.88",
        ("small", 10, "10pct"): "66.31/78.42/34.17 69.52/81.14/41.08 71.88/82.73/45.94 75.20/84.85/51.36",
        ("small", 100, "1pct"): "42.19/63.85/8.17 51.83/69.74/19.42 55.12/73.02/22.81 61.30/77.13/29.76",
        ("small", 100, "10pct"): "53.28/73.10/16.72 60.41/76.85/27.53 63.64/79.27/31.12 68.25/81.68/37.89",
        ("base", 10, "1pct"): "58.94/73.81/25.42 63.12/77.35/32.78 66.53/79.90/37.41 70.14/83.25/43.25",
        ("base", 10, "10pct"): "69.12/81.34/38.25 72.85/83.92/44.18 74.32/84.50/48.03 76.81/85.42/52.19",
        ("base", 1000, "1pct"): "33.47/58.83/3.12 42.89/65.14/11.53 49.72/71.02/15.37 55.83/74.62/19.94",
        ("base", 1000, "10pct"): "38.10/70.42/5.37 46.32/73.84/14.09 52.88/77.01/18.53 58.94/79.85/22.10",
    }
    for (size, imbalance, share), numbers in table_4.items():
        for k, number in enumerate(numbers.split()):
            family, average = ("semivit", "semivim")[k // 2], ("ema", "lyapema")[k % 2]
            values = [averages[average], *(["ssmixup={}"] if family == "semivim" else [])]
            notes = "f" + ("d" if number.startswith("55.83") else "") + ("gi" if imbalance == 1000 else "")
            name = f"T4-{family}-{size}-IF{imbalance}-{share}-{average}"
            yield Row(name, f"{family}_{size}", share, values, number, notes, imbalance)
    readme = {"fixmatch_resnet50": "- 57.7", "semivit_huge": "58.9 73.5", "semivim_base": "66.3 77.4"}
    for model, numbers in readme.items():
        for share, number in zip(("1pct", "10pct"), numbers.split(), strict=True):
            # 66.3 and 77.4 are Table 3's at 0.75.
            values = {"semivim_base": [LYAPEMA, "ssmixup={}", "pseudo.threshold=0.75"], "semivit_huge": [PLAIN_EMA]}
            notes = "eh" if model == "semivit_huge" else "h"
            yield Row(f"R-{model}-{share}", model, share, values.get(model, []), number, notes, long_tailed=True)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Stages 2 and 3 of a model at a share of the labels: the config files, their overrides, and how long they train."""

    configs: tuple[str, str]  # configs/distill/NAME.yaml and configs/semi/NAME.yaml
    model: str  # `model` of stage 2
    first: Sequence[str]  # further overrides of stage 2
    second: Sequence[str] = ()  # overrides of stage 3
    batches: tuple[int, int] = (512, 128)  # labelled images per step; stage 3 adds five unlabelled ones to each
    # Epochs of stage 2 over the labelled images, and of stage 3 over the unlabelled ones; None = the config's steps.
    epochs: tuple[int, int | None] = (100, 100)

    def starts(self, export: Path) -> list[str]:
        """Overrides of stage 3 that name stage 2's export; with an average the student starts from the model beside it (Huge)."""
        if any(value.startswith("average=") for value in self.first):
            return [f"init_from={export.with_name('export-student')}", f"teacher_from={export}"]
        return [f"init_from={export}", "teacher_from=null"]

    def overrides(self, row: Row) -> tuple[list[str], list[str]]:
        """Overrides of stage 2 and of stage 3.

        Args:
            row: The row; its number of images decides the steps. The learning rate rises over five epochs, as published.
        """
        labelled, unlabelled = row.images()
        first = [f"model={self.model}", *self.first, *_length(labelled, self.batches[0], self.epochs[0])]
        second = list(self.second)
        if self.epochs[1] is not None:
            second += _length(unlabelled, 5 * self.batches[1], self.epochs[1], batch=self.batches[1])
        return first, second


def pretraining() -> list[str]:
    """Overrides of stage 1 for Semi-ViM's rows.

    It reads no labels and sees all images, as a masked autoencoder did. So one run serves every split.
    """
    epoch = TRAIN_IMAGES / 2048  # the config's batch; the config itself holds out a validation subset
    steps, warmup = round(300 * epoch), round(40 * epoch)
    return ["data.split=null", "linear_probe=null", f"loop.steps={steps}", f"optim.warmup_steps={warmup}"]


def _length(images: int, size: int, epochs: int, batch: int | None = None) -> list[str]:
    batch = batch or size
    steps, warmup = round(epochs * images / size), round(5 * images / size)
    virtual_readers = min(256, batch // 2)  # mixup pairs images of one reader, so each needs two of a batch
    return [
        f"loop.global_batch={batch}",
        f"data.loader.virtual_readers={virtual_readers}",
        f"loop.steps={steps}",
        f"optim.warmup_steps={warmup}",
        f"loop.eval_every={max(100, steps // 20)}",
        f"loop.save_every={max(100, steps // 40)}",
    ]


def recipe(row: Row) -> Recipe:
    """The configs and overrides that `row` runs with on ImageNet."""
    few = row.share in ("0.1pct", "1pct")  # published at 1 %: no drop path, no erasing, no mixup; tau is 0.6
    plain = ["augment.erase=0", "mix={}"] if few else []
    unmixed = ["strong.erase=0", "mixup.labelled_mixup=0", "mixup.labelled_cutmix=0"] if few else []
    base_1 = [*plain, f"optim.lr={1e-4 if few else 5e-4}"]
    base_2 = [f"pseudo.threshold={0.6 if few else 0.5}", f"drop_path={0 if few else 0.1}", *unmixed]
    family, _, size = row.model.partition("_")
    if family == "semivim":
        parent = f"init_from=runs/table-imagenet-{row.model}/arm/export"
        shape = f"{{name: {row.model}, drop_path: {0 if few else 0.1}}}"
        name = "imagenet_semivim_base_10pct"
        return Recipe(configs=(name, name), model=shape, first=[*base_1, parent], second=base_2)
    if family == "fixmatch":
        configs = "imagenet_resnet50_10pct", "imagenet_lt_fixmatch_resnet50"
        return Recipe(configs=configs, model="{name: timm/resnet50}", first=[], epochs=(200, None))
    weights = f"weights={{path: weights/{_PRETRAINED[size]}, saw_labels: false}}"
    if size != "huge":
        tag = "dino" if size == "small" else "mae"
        shape = f"{{name: timm/vit_{size}_patch16_224.{tag}, drop_path: {0 if few else 0.1}, options: {{global_pool: avg}}}}"
        configs = "imagenet_semivit", "imagenet_semivit_base"
        return Recipe(configs=configs, model=shape, first=[*base_1, weights], second=base_2)
    shape = f"{{name: timm/vit_huge_patch14_224.mae, drop_path: {0 if few else 0.2}}}"  # reads the cls token
    first = [*plain, weights, "optim.layer_decay=0.75", f"optim.lr={5e-3 if few else 5e-4}"]
    if not few:
        first.append("average={decay: 0.9998}")
    second = [f"pseudo.threshold={0.7 if few else 0.6}", f"drop_path={0.05 if few else 0.1}", "optim.lr=1.25e-3"]
    configs = "imagenet_semivit", "imagenet_semivit_huge"
    batches = 128, 64 if few else 128
    return Recipe(configs=configs, model=shape, first=first, second=second, batches=batches, epochs=(50, 50))


# Masked autoencoders, except Small: Semi-ViT's Small starts from DINO, and no command of it is published.
_PRETRAINED = {"small": "dino_vit_small.pth", "base": "mae_pretrain_vit_base.pth", "huge": "mae_pretrain_vit_huge.pth"}
