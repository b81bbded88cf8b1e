"""The classes of a dataset: in a given order, or as another dataset has them."""

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path

from pipeline.datasets.text import read_text, same_form
from pipeline.errors import DataError


def read_classes(path: Path) -> list[str]:
    """Return the class names of a file, one a line, or of the dataset in a folder.

    Raises:
        DataError: There is no such file or dataset, or it names no class, or a class twice.
    """
    if path.is_dir():
        from pipeline.datasets.manifest import read_manifest

        names = list(read_manifest(path).classes)
    else:
        names = [same_form(line.strip()) for line in read_text(path, "class list").splitlines() if line.strip()]
    if not names:
        raise DataError(f"--classes {path} names no class; give a file of class names, one a line, or another dataset")
    if twice := sorted({name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else ()):
        raise DataError(f"--classes {path} names {', '.join(map(repr, twice[:5]))} twice; remove the repeated lines")
    return names


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
        DataError: A name is not in `wanted`.
    """
    forms = {name: same_form(name) for name in found}
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
