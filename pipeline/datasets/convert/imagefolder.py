"""A folder per class, or a folder without classes, as a source."""

import os
from collections.abc import Sequence
from pathlib import Path

from pipeline.datasets.convert.classes import class_labels
from pipeline.datasets.convert.scan import find_images
from pipeline.datasets.convert.source import Files, LeftOut, make_keys
from pipeline.datasets.formats import is_hidden
from pipeline.datasets.text import shown, storable
from pipeline.errors import DataError
from pipeline.files import real_path


def plain_folder(root: Path, classes: Sequence[str] = ()) -> Files:
    """Take all images below a folder, at any depth, as images without a label.

    Args:
        root: The folder.
        classes: The classes that the dataset has all the same, as those of another one.

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
    return Files(str(root), list(classes), keys, [-1] * len(names), paths, names, problems, left_out)


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
    _check_unlabelled(unlabelled)
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
    add_unlabelled(unlabelled, names, labels, paths, left_out)
    keys, problems = make_keys(names)
    return Files(str(root), known, keys, labels, paths, names, problems, left_out)


def add_unlabelled(
    folders: Sequence[Path], names: list[str], labels: list[int], paths: list[str], left_out: LeftOut
) -> None:
    """Append the images of folders as images without a label, unless they are among `paths` already.

    Args:
        folders: The folders.
        names: Name of each image of the source.
        labels: Class of each image.
        paths: Full path of each image.
        left_out: Takes the names of other files, by the reason.

    Raises:
        DataError: There is no such folder, or it has no images.
    """
    _check_unlabelled(folders)
    known = set(map(os.path.realpath, paths))
    for folder, prefix in zip(
        folders, _prefixes(len(folders), {name.rpartition("/")[0] for name in names}), strict=True
    ):
        found = find_images(folder, left_out)
        if not found:
            raise DataError(f"--unlabelled {folder} has no images{_passed_over(left_out)}; give a folder of images")
        more = [name for name in found if os.path.realpath(folder / name) not in known]
        known |= {os.path.realpath(folder / name) for name in more}
        if twice := sorted(set(found) - set(more)):
            left_out.setdefault("taken already", []).extend(map(shown, twice))
        names += [prefix + name for name in more]
        labels += [-1] * len(more)
        paths += [str(folder / name) for name in more]


def _split(name: str, nested: bool) -> tuple[str, str]:
    """Return the class folder of an image and the rest of its name."""
    folder, _, rest = name.rpartition("/") if nested else name.partition("/")
    return folder, rest


def _empty_classes(root: Path, full: set[str], exclude: Sequence[Path]) -> list[str]:
    with os.scandir(root) as entries:
        folders = sorted(entry.name for entry in entries if entry.is_dir() and not is_hidden(entry.name))
    return [name for name in folders if name not in full and real_path(root / name) not in exclude]


def _prefixes(count: int, others: set[str]) -> list[str]:
    """Return the folders, within the dataset, of unlabelled images; no folder of other images has such a name."""
    top = "unlabelled"
    while any(name == top or name.startswith(top + "/") for name in others):
        top = "_" + top
    return [f"{top}/"] if count == 1 else [f"{top}/{k}/" for k in range(count)]


def _check_unlabelled(folders: Sequence[Path]) -> None:
    for folder in folders:
        _check_folder(folder, "give a folder of images after --unlabelled")


def _check_folder(folder: Path, instead: str) -> None:
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; {instead}")


def _passed_over(left_out: LeftOut) -> str:
    counts = [f"{len(names)} {reason} ({names[0]})" for reason, names in left_out.items()]
    return f" (found {', '.join(counts)})" if counts else ""
