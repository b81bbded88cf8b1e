"""The classes of a dataset: in a given order, or as another dataset has them."""

import difflib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from pipeline.datasets.formats import is_hidden
from pipeline.datasets.text import is_text, read_text, same_form, storable
from pipeline.errors import DataError

_SUBSETS = {"train", "training", "val", "valid", "validation", "test", "testing", "dev", "unlabelled", "unlabeled"}


def read_classes(path: Path) -> list[str]:
    """Return the class names of a file, one a line, or of the dataset or the class folders in a folder.

    Raises:
        DataError: There is no such file or dataset, or it names no class, or a class twice.
    """
    if path.is_dir():
        names = _classes_of(path)
    else:
        names = [same_form(line.strip()) for line in read_text(path, "class list").splitlines() if line.strip()]
    if not names:
        raise DataError(f"--classes {path} names no class; give a file of class names, one a line, or another dataset")
    if twice := sorted({name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else ()):
        raise DataError(f"--classes {path} names {', '.join(map(repr, twice[:5]))} twice; remove the repeated lines")
    return names


def _classes_of(folder: Path) -> list[str]:
    """Return the classes of a dataset in shards, or of a folder of images per class."""
    from pipeline.datasets.manifest import HEADER, read_manifest

    if (folder / HEADER).exists() or any(folder.glob("*.tar")):
        return list(read_manifest(folder).classes)
    with os.scandir(folder) as entries:
        found = [storable(entry.name) for entry in entries if entry.is_dir() and not is_hidden(entry.name)]
    return class_labels(found, None, str(folder))[0]


def class_labels(found: Iterable[str], wanted: Sequence[str] | None, where: str) -> tuple[list[str], dict[str, int]]:
    """Number the classes of a source.

    Names that differ only in their Unicode form are one class. Without a list, classes are sorted by name, and by number
    if all of them are whole numbers.

    Args:
        found: Names of the classes as the source has them.
        wanted: The classes to have, in the order of the labels; None = those found.
        where: What the refusal calls the source.

    Returns:
        The classes, and the label of each name in `found`.

    Raises:
        DataError: A name is not in `wanted`, or is no text of one line.
    """
    forms = {name: same_form(name) for name in found}
    if strange := [name for name in forms if not is_text(name) or set(name) & set("\0\n\r")]:
        raise DataError(
            f"{where} has the class name {strange[0][:80]!r}, which is no text of one line; repair it (in a table, a quote may"
            " be left open)"
        )
    if wanted is None:
        names = set(forms.values())
        numbers = all(name.isascii() and name.isdigit() for name in names)
        classes = sorted(names, key=lambda name: (int(name), name) if numbers else (0, name))
    else:
        classes = list(wanted)
    label_of = {same_form(name): label for label, name in enumerate(classes)}
    if strangers := sorted({form for form in forms.values() if form not in label_of}):
        near = difflib.get_close_matches(strangers[0], label_of, 1)
        hint = f"the nearest is {near[0]!r}" if near else f"the first is {classes[0]!r}"
        more = " and more" if len(strangers) > 10 else ""
        raise DataError(
            f"{where} has {len(strangers)} classes that --classes does not name: {', '.join(map(repr, strangers[:10]))}{more}; "
            f"the list has {len(classes)} classes, {hint}; rename them, or give another list"
        )
    return classes, {name: label_of[form] for name, form in forms.items()}


def doubts(classes: Sequence[str]) -> list[str]:
    """Return sentences about classes that are perhaps not meant as such."""
    found = []
    alike: dict[str, list[str]] = {}
    for name in classes:
        alike.setdefault(" ".join(name.casefold().replace("_", " ").replace("-", " ").split()), []).append(name)
    if twins := [group for group in alike.values() if len(group) > 1]:
        shown = "; ".join(" and ".join(map(repr, group)) for group in twins[:5])
        found.append(f"these classes differ only in case, spaces or hyphens and are kept apart: {shown}")
    if classes and {name.casefold() for name in classes} <= _SUBSETS:
        found.append(
            f"{', '.join(map(repr, classes))} are taken as classes; if they are parts of a dataset, convert each part"
        )
    return found
