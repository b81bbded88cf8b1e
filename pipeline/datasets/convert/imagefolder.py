"""A folder per class as a source."""

import os
from pathlib import Path

from pipeline.datasets.convert.source import Files, keys_of
from pipeline.datasets.tars import IMAGE_EXTENSIONS
from pipeline.errors import DataError


def image_folder(root: Path) -> Files:
    """Take a folder per class, as torchvision's ImageFolder: classes sorted by name, images at any depth below.

    Raises:
        DataError: There is no such folder, or a class without images.
    """
    if not root.is_dir():
        raise DataError(f"{root} is not a folder; give the folder that holds a folder per class")
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    names, labels = [], []
    for label, name in enumerate(classes):
        found = images_below(root / name)
        if not found:
            raise DataError(
                f"class folder {root / name} has no images ({', '.join(IMAGE_EXTENSIONS)}); remove it or add some"
            )
        names += [f"{name}/{image}" for image in found]
        labels += [label] * len(found)
    if not names:
        raise DataError(f"{root} has no class folders with images; expected {root}/CLASS/IMAGE.jpg")
    return Files(str(root), classes, keys_of(names), labels, [str(root / name) for name in names])


def images_below(folder: Path) -> list[str]:
    """Return the sorted paths, relative to `folder`, of all image files below it."""
    suffixes = tuple("." + extension for extension in IMAGE_EXTENSIONS)
    found = []
    for parent, _, files in os.walk(folder):
        prefix = "" if parent == str(folder) else os.path.relpath(parent, folder) + "/"
        found += [prefix + file for file in files if file.lower().endswith(suffixes)]
    return sorted(found)
