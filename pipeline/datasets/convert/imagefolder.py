"""A folder per class, or a folder without classes, as a source."""

import os
from collections.abc import Sequence
from pathlib import Path

from pipeline.datasets.convert.classes import class_labels
from pipeline.datasets.convert.scan import find_images
from pipeline.datasets.convert.source import Files, LeftOut, make_keys
from pipeline.datasets.formats import is_hidden
from pipeline.datasets.text import storable
from pipeline.errors import DataError
from pipeline.files import real_path


def plain_folder(root: Path) -> Files:
    """Take all images below a folder, at any depth, as images without a label.

    Raises:
        DataError: There is no such folder, or it has no images.
    """
    _check_folder(root, "give a folder of images")
    left_out: LeftOut = {}
    names = find_images(root, left_out)
    if not names:
        raise DataError(f"{root} has no images{_passed_over(left_out)}; give a folder of images")
    keys, problems = make_keys(names)
    paths = [str(root / name) for name in names]
    return Files(str(root), [], keys, [-1] * len(names), paths, names, problems, left_out)


def image_folder(
    root: Path, *, classes: Sequence[str] | None = None, unlabelled: Sequence[Path] = (), nested: bool = False
) -> Files:
    """Take a folder per class, as torchvision's ImageFolder: classes sorted by name, images at any depth below.

    Args:
        root: Folder of the class folders.
        classes: The classes to have, some of which may have no images; None = the class folders.
        unlabelled: Folders of images without a label. They may lie in `root`, and are then no class.
        nested: Whether each folder that holds images is a class, named by its path (`animals/cat`).

    Raises:
        DataError: There is no such folder, or a class without images, or one that `classes` does not name.
    """
    _check_folder(root, "give the folder that holds a folder per class")
    for folder in unlabelled:
        _check_folder(folder, "give a folder of images after --unlabelled")
    left_out: LeftOut = {}
    inside = [real_path(folder) for folder in unlabelled]
    found = find_images(root, left_out, inside)
    names = sorted((name for name in found if "/" in name), key=lambda name: _split(name, nested))
    if outside := [name for name in found if "/" not in name]:
        left_out["outside the class folders"] = [storable(name) for name in outside]
    if not names:
        alone = f"; for images without classes: python -m pipeline.data convert folder {root}" if outside else ""
        raise DataError(
            f"{root} has no class folders with images{_passed_over(left_out)}; expected {root}/CLASS/IMAGE.jpg{alone}"
        )
    labelled = [storable(_split(name, nested)[0]) for name in names]
    empty = [] if nested else _empty_classes(root, {_split(name, False)[0] for name in names}, inside)
    if empty and classes is None:
        raise DataError(
            f"class folder {root / empty[0]} has no images{_passed_over(left_out)}; remove it or add some, or give the "
            "classes with --classes, of which some may then have no images"
        )
    known, label_of = class_labels({*labelled, *map(storable, empty)}, classes, str(root))
    labels = [label_of[name] for name in labelled]
    paths = [str(root / name) for name in names]
    for folder, prefix in zip(unlabelled, _prefixes(len(unlabelled), set(labelled)), strict=True):
        more = find_images(folder, left_out)
        if not more:
            raise DataError(f"--unlabelled {folder} has no images{_passed_over(left_out)}; give a folder of images")
        names += [prefix + name for name in more]
        labels += [-1] * len(more)
        paths += [str(folder / name) for name in more]
    keys, problems = make_keys(names)
    return Files(str(root), known, keys, labels, paths, names, problems, left_out)


def _split(name: str, nested: bool) -> tuple[str, str]:
    """Return the class folder of an image and the rest of its name."""
    folder, _, rest = name.rpartition("/") if nested else name.partition("/")
    return folder, rest


def _empty_classes(root: Path, full: set[str], exclude: Sequence[Path]) -> list[str]:
    with os.scandir(root) as entries:
        folders = sorted(entry.name for entry in entries if entry.is_dir() and not is_hidden(entry.name))
    return [name for name in folders if name not in full and real_path(root / name) not in exclude]


def _prefixes(count: int, classes: set[str]) -> list[str]:
    """Return the folders, within the dataset, of unlabelled images; no class folder has such a name."""
    top = "unlabelled"
    while any(name == top or name.startswith(top + "/") for name in classes):
        top = "_" + top
    return [f"{top}/"] if count == 1 else [f"{top}/{k}/" for k in range(count)]


def _check_folder(folder: Path, instead: str) -> None:
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; {instead}")


def _passed_over(left_out: LeftOut) -> str:
    counts = [f"{len(names)} {reason} ({names[0]})" for reason, names in left_out.items()]
    return f" (found {', '.join(counts)})" if counts else ""
