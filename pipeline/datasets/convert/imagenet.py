"""ImageNet's flat validation folder and the several forms in which its ground truth is handed around."""

import re
from collections.abc import Sequence
from pathlib import Path

from pipeline.datasets.convert.sources import Files, images_below, keys_of
from pipeline.errors import DataError


def imagenet_validation(folder: Path, truth: Path, synsets: Path | None, classes: Sequence[str]) -> Files:
    """ImageNet's flat validation folder; see `_read_truth` for what `truth` and `synsets` may be."""
    names = images_below(folder)
    if not names:
        raise DataError(f"{folder} has no images; expected ILSVRC2012_val_00000001.JPEG and so on")
    by_stem, in_turn = _read_truth(truth, synsets)
    if in_turn and len(in_turn) != len(names):
        raise DataError(f"{truth} has {len(in_turn)} lines for the {len(names)} images of {folder}")
    wnids = in_turn or [by_stem.get(Path(name).stem, "") for name in names]
    label_of = {wnid: label for label, wnid in enumerate(classes)}
    for name, wnid in zip(names, wnids, strict=True):
        if wnid not in label_of:
            raise DataError(f"{truth}: image {name} is of class {wnid!r}, which is none of the {len(classes)} classes")
    labels = [label_of[wnid] for wnid in wnids]
    return Files(str(folder), classes, keys_of(names), labels, [str(folder / name) for name in names])


def _read_truth(path: Path, synsets: Path | None) -> tuple[dict[str, str], list[str]]:
    """Class ids by image name, or one per image in order of name.

    Lines of `IMAGE WNID`, with commas or spaces (also Kaggle's LOC_val_solution.csv); lines of a WNID; or the
    development kit's numbers. Those count ImageNet's own order, not the sorted one: `synsets` must translate them,
    the kit's meta.mat or a text with one WNID a line.
    """
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
            raise DataError(f"{path} has class {max(numbers)}, {synsets} names {len(ids)}")
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
    if not path.is_file():
        raise DataError(f"{path} does not exist; it must say which class each image is of")
    return [line for line in path.read_text().splitlines() if line.strip()]
