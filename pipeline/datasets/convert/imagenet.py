"""ImageNet's flat validation folder as a source, with the several forms in which its ground truth is distributed."""

import re
from collections.abc import Sequence
from pathlib import Path

from pipeline.datasets.convert.scan import find_images
from pipeline.datasets.convert.source import Files, LeftOut, make_keys
from pipeline.datasets.text import read_text
from pipeline.errors import DataError


def imagenet_validation(folder: Path, truth: Path, synsets: Path | None, classes: Sequence[str]) -> Files:
    """Take ImageNet's flat validation folder.

    Args:
        folder: Folder with ILSVRC2012_val_00000001.JPEG and so on.
        truth: File that says the class of each image. Its lines are `IMAGE WNID`, with commas or spaces (also Kaggle's
            LOC_val_solution.csv); or a WNID each, in the order of the images; or the development kit's numbers.
        synsets: The kit's meta.mat, or a text with one WNID a line. The kit's numbers count ImageNet's own order, not
            the sorted one, so they need it.
        classes: WNIDs of the training set, in the order of the labels.

    Raises:
        DataError: A file is missing, or the truth does not fit the images or the classes.
    """
    left_out: LeftOut = {}
    names = find_images(folder, left_out)
    if not names:
        raise DataError(f"{folder} has no images; expected ILSVRC2012_val_00000001.JPEG and so on")
    by_stem, in_turn = _read_truth(truth, synsets)
    if in_turn and len(in_turn) != len(names):
        raise DataError(
            f"{truth} has {len(in_turn)} lines for the {len(names)} images of {folder}; give one line an image"
        )
    wnids = in_turn or [by_stem.get(Path(name).stem, "") for name in names]
    label_of = {wnid: label for label, wnid in enumerate(classes)}
    for name, wnid in zip(names, wnids, strict=True):
        if wnid not in label_of:
            raise DataError(f"{truth}: image {name} has class {wnid!r}, which is not among the {len(classes)} classes")
    labels = [label_of[wnid] for wnid in wnids]
    keys, problems = make_keys(names)
    return Files(str(folder), classes, keys, labels, [str(folder / name) for name in names], names, problems, left_out)


def _read_truth(path: Path, synsets: Path | None) -> tuple[dict[str, str], list[str]]:
    """Return WNIDs by image name, or else one WNID per image in order of name; the other one is empty."""
    rows = [re.split(r"[,\s]+", line.strip()) for line in _lines(path)]
    if all(len(row) == 1 and row[0].isdigit() for row in rows):
        if synsets is None:
            raise DataError(
                f"{path} numbers the classes in ImageNet's own order; give --synsets with the kit's meta.mat "
                "or a text of one WNID a line in that order"
            )
        ids = _synset_ids(synsets)
        numbers = [int(row[0]) for row in rows]
        if min(numbers) < 1 or max(numbers) > len(ids):
            raise DataError(f"{path} has class {max(numbers)}, but {synsets} names {len(ids)} classes")
        return {}, [ids[number - 1] for number in numbers]
    if all(len(row) == 1 for row in rows):
        return {}, [row[0] for row in rows]
    return {Path(row[0]).stem: row[1] for row in rows if len(row) > 1 and row[0] != "ImageId"}, []


def _synset_ids(path: Path) -> list[str]:
    if path.suffix != ".mat":
        return [line.split()[0] for line in _lines(path)]
    from scipy.io import loadmat

    table = loadmat(path, squeeze_me=True)["synsets"]
    return [str(wnid) for _, wnid in sorted(zip(table["ILSVRC2012_ID"].tolist(), table["WNID"].tolist(), strict=True))]


def _lines(path: Path) -> list[str]:
    return [line for line in read_text(path, "file of classes").splitlines() if line.strip()]
