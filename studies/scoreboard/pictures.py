"""The data sets of the scoreboard, and the label regimes that their splits make."""

import csv
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline import seeds
from pipeline.datasets.config import SplitConfig
from pipeline.datasets.convert.imagefolder import image_folder
from pipeline.datasets.manifest import Manifest, read_manifest
from pipeline.datasets.splits import Split, make_split, read_split, write_split
from studies import glyphs
from studies.runs import prepare
from tests.relabel import relabelled

DATA = Path("data/scoreboard")
TEST_SHARE = 0.25  # share that is cut off a folder without a test set of its own
NUM_GLYPHS = 60  # classes
BUNDLED = ("digits", "letters", "glyphs", "icons")
_SPLIT = 43  # stream of random numbers


class Regime(NamedTuple):
    """How many labels there are.

    Attributes:
        title: What the table calls it.
        split: Fields of `SplitConfig`.
        hidden: Whether the unlabelled images have labels, which the split hides; else they have none at all.
    """

    title: str
    split: dict[str, float]
    hidden: bool = True


def _labels(number: int) -> dict[str, float]:
    return {"labelled": 1e-9, "min_labelled_per_class": number, "validation_per_class": max(1, number // 2)}


def _tenth(imbalance: float) -> dict[str, float]:
    return {"labelled": 0.1, "imbalance": imbalance, "validation_per_class": 5}


REGIMES = {
    "1": Regime("1 label a class", _labels(1)),
    "4": Regime("4 labels a class", _labels(4)),
    "10": Regime("10 labels a class", _labels(10)),
    "imbalance-10": Regime("10 % labelled, imbalance 10", _tenth(10)),
    "imbalance-100": Regime("10 % labelled, imbalance 100", _tenth(100)),
    "pool": Regime("10 labels a class, a pool without labels", _labels(10), hidden=False),
}
MEASURED = ("10", "1", "imbalance-10", "4", "imbalance-100", "pool")  # the order of the measurements


class Pictures(NamedTuple):
    """A data set of the scoreboard: folders with a manifest."""

    name: str
    train: Path
    test: Path


class Case(NamedTuple):
    """One data set under one regime and seed: what a column may learn from, and what it is tested on."""

    pictures: Pictures
    train: Path
    split_file: Path
    test: Path
    manifest: Manifest
    split: Split


def prepared(name: str, folder: Path | None = None) -> Pictures:
    """Make a data set, unless it is there.

    Args:
        name: Its name; one of `BUNDLED` if there is no folder.
        folder: Images in a folder per class, or such folders in train/ and test/.

    Raises:
        DataError: The machine has too few fonts or icons, or the folder has no class folders with images.
    """
    out = DATA / name
    pictures = Pictures(name, out / "train", out / "test")
    if (out / "test" / "manifest.json").is_file():
        return pictures
    if folder is None and name in ("digits", "letters"):
        prepare("convert", name, "--out", str(out))
        return pictures
    if folder is None:
        folder = Path("data/pictures") / name
        if not (folder / "sources.txt").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            if name == "glyphs":
                known = glyphs.faces([*glyphs.FONTS, glyphs.matplotlib_fonts()])
                glyphs.write_glyphs(folder, known, classes=NUM_GLYPHS, variants=1, seed=0)
            else:
                glyphs.write_icons(folder, list(glyphs.THEMES), least=24, seed=0)
    if (folder / "train").is_dir() and (folder / "test").is_dir():
        for subset in ("train", "test"):
            prepare("convert", "imagefolder", str(folder / subset), "--out", str(out / subset))
        return pictures
    tables = _cut(folder, out)
    for subset, table in tables.items():
        told = ["--image", "image", "--label", "label", "--root", str(folder), "--skip-unreadable"]
        prepare("convert", "csv", str(table), "--out", str(out / subset), *told)
    return pictures


def _cut(folder: Path, out: Path) -> dict[str, Path]:
    """Cut a test set off a folder per class; returns the tables of both sets."""
    found = image_folder(folder)
    labels = np.asarray(found.labels)
    tested = np.zeros(len(labels), bool)
    for label in range(len(found.classes)):
        own = np.flatnonzero(labels == label)
        order = own[np.asarray(seeds.permutation(len(own), label, _SPLIT))]
        tested[order[: max(1, round(TEST_SHARE * len(own)))]] = True
    out.mkdir(parents=True, exist_ok=True)
    tables = {}
    for subset, chosen in (("train", ~tested), ("test", tested)):
        tables[subset] = out / f"{subset}.csv"
        rows = [(found.names[k], found.classes[labels[k]]) for k in np.flatnonzero(chosen)]
        with tables[subset].open("w", newline="") as file:
            csv.writer(file).writerows([("image", "label"), *rows])
    return tables


def split_of(pictures: Pictures, regime: str, seed: int) -> Case:
    """Make the split of a data set under a regime, unless it is there.

    Raises:
        DataError: A class has too few images for the regime.
    """
    chosen = REGIMES[regime]
    train = pictures.train
    file = DATA / pictures.name / f"{regime}-seed{seed}.json"
    manifest = read_manifest(train)
    if not chosen.hidden:
        # Only the labels of as many images a class as the split gives away are kept.
        kept = make_split(manifest, SplitConfig(**chosen.split), seed)
        train = DATA / pictures.name / f"{regime}-seed{seed}"
        if not train.is_dir():
            labels = np.where(np.isin(kept.codes, (b"L", b"V")), manifest.labels, -1)
            unfinished = train.with_suffix(".partial")
            shutil.rmtree(unfinished, ignore_errors=True)
            relabelled(manifest, unfinished, labels)
            unfinished.rename(train)
        manifest = read_manifest(train)
    if not file.is_file():
        write_split(make_split(manifest, SplitConfig(**chosen.split), seed), file)
    return Case(pictures, train, file, pictures.test, manifest, read_split(file, manifest))
