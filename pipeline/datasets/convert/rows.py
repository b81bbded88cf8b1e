"""A table whose rows name image files and their classes, as a source: CSV, TSV or JSON lines."""

import csv
import io
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.datasets.convert.classes import class_labels
from pipeline.datasets.convert.imagefolder import add_unlabelled
from pipeline.datasets.convert.source import Files, LeftOut, Problem, make_keys
from pipeline.datasets.formats import FOREIGN_EXTENSIONS, IMAGE_EXTENSIONS
from pipeline.datasets.parallel import counted
from pipeline.datasets.text import read_text, same_form, shown, storable
from pipeline.errors import ConfigError, DataError

DELIMITERS = ",;\t|"
NO_LABEL = ("", "nan", "none", "null", "na", "n/a", "<na>")  # in small letters, as pandas and R write a missing value


def table_file(
    path: Path,
    image_column: str,
    label_column: str | None,
    root: Path | None,
    classes: Sequence[str] | None = None,
    unlabelled: Sequence[Path] = (),
) -> Files:
    """Take the images that a table names.

    Args:
        path: CSV with a row of titles, with any of `DELIMITERS` between the fields; or JSON, an object a line or one list.
        image_column: Title of the column of file names. Backslashes, a missing ending of an image, and either Unicode
            form are understood.
        label_column: Title of the column of class names or numbers; an empty field is an image without a label.
            None = no image has a label.
        root: Folder of the file names; None = the folder of the table.
        classes: The classes to have; None = those of the column.
        unlabelled: Folders of images without a label; those that the table names are not taken twice.

    Raises:
        DataError: The file is missing, no table, or a class is not in `classes`.
        ConfigError: The table has no such column.
    """
    rows = _read_rows(path, [image_column, *([label_column] if label_column else [])])
    if not rows:
        raise DataError(f"{path} has no rows below its titles; give a table of images")
    folder = (path.parent if root is None else root).absolute()
    if not folder.is_dir():
        raise DataError(f"{shown(str(folder))} is no folder; give that of the files which {path} names as --root")
    finder = _Finder(folder)
    values = [str(row.get(image_column) or "").strip() for row in rows]
    texts = _whole_numbers([_label_text(row.get(label_column)) if label_column else "" for row in rows])
    known, label_of = class_labels({text for text in texts if text}, classes, f"column {label_column!r} of {path}")
    names: list[str] = []
    paths: list[str] = []
    labels: list[int] = []
    left_out: LeftOut = {}
    problems: dict[int, Problem] = {}
    seen: dict[str, int] = {}
    rows_read = counted(zip(values, texts, strict=True), "rows", len(rows))
    for number, (value, text) in enumerate(rows_read, start=1):
        label = label_of[text] if text else -1
        found = finder.find(value)
        place = os.path.normpath(found) if found else f"row {number}"
        item = len(names)
        if (first := seen.setdefault(place, item)) != item and labels[first] == label:
            left_out.setdefault("row repeated", []).append(shown(value))
            continue
        if first != item:
            detail = f"row {number}: {shown(value)} has another label in an earlier row"
            problems[item] = Problem("two labels", detail)
        elif not found:
            problems[item] = Problem("missing", f"row {number}: {shown(value)!r} is no file below {shown(str(folder))}")
        names.append(_name(place, folder) if found else f"row {number} ({storable(value)[:80]})")
        paths.append(place)
        labels.append(label)
    add_unlabelled(unlabelled, names, labels, paths, left_out)
    keys, unusable = make_keys(names)
    problems = unusable | problems
    return Files(str(path), known, keys, labels, paths, names, problems, left_out)


class _Finder:
    """Finds the file that a field names."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._stems: dict[str, dict[str, list[str]]] = {}

    def find(self, value: str) -> str:
        """Return the path of a file; empty if there is none, or if several have the name."""
        slashed = value.replace("\\", "/")
        for name in dict.fromkeys((value, slashed)):
            path = os.path.join(self._root, name)
            if name and "\0" not in name and os.path.isfile(path):
                return path
        if not slashed or "\0" in slashed:
            return ""
        folder, _, file = os.path.join(self._root, slashed).rpartition("/")
        if folder not in self._stems:
            self._stems[folder] = _by_stem(folder)
        known = self._stems[folder]
        found = known.get(same_form(file), [])
        return os.path.join(folder, found[0]) if len(found) == 1 else ""


def _by_stem(folder: str) -> dict[str, list[str]]:
    """Return the files of a folder by their names in one Unicode form, with and without the ending of an image."""
    found: dict[str, list[str]] = {}
    try:
        listed = sorted(entry.name for entry in os.scandir(folder) if entry.is_file())
    except OSError:
        return {}
    for name in listed:
        form = same_form(storable(name))
        stem, _, extension = form.rpartition(".")
        found.setdefault(form, []).append(name)
        if stem and extension.lower() in (*IMAGE_EXTENSIONS, *FOREIGN_EXTENSIONS):
            found.setdefault(stem, []).append(name)
    return found


def _name(path: str, root: Path) -> str:
    """Return the name of an image within the dataset: below the root, or else without what leads out of it."""
    name = os.path.relpath(path, root)
    return "/".join(piece for piece in name.split("/") if piece not in ("..", "."))


def _label_text(value: Any) -> str:
    if isinstance(value, (list, dict)):
        raise DataError(
            f"the label {str(value)[:80]} is no text and no number; give a column of class names with --label"
        )
    if isinstance(value, float) and value != value:
        return ""
    text = "" if value is None else str(value).strip()
    return "" if text.lower() in NO_LABEL else text


def _whole_numbers(texts: list[str]) -> list[str]:
    """Return `3` for `3.0`, as pandas writes it where some are missing, and nothing for -1, if all labels are numbers."""
    numbers = [text.removesuffix(".0") for text in texts]
    given = [text for text in numbers if text not in ("", "-1")]
    if given and all(text.isdigit() and text.isascii() for text in given):
        return ["" if text == "-1" else text for text in numbers]
    return texts


def _read_rows(path: Path, columns: Sequence[str]) -> list[Mapping[str, Any]]:
    rows, titles = read_table(path, columns)
    if rows is not None:
        return rows
    missing = next(column for column in columns if column not in titles)
    known = ", ".join(map(repr, titles)) or "no titles"
    raise ConfigError(f"{path} has no column {missing!r}; its first line has {known}; choose with --image and --label")


def read_table(path: Path, columns: Sequence[str]) -> tuple[list[Mapping[str, Any]] | None, list[str]]:
    """Read a table that a person or a spreadsheet has written: CSV with any of `DELIMITERS`, or JSON.

    Returns:
        The rows, or None if a column of `columns` is missing; and the titles of the columns that it has.

    Raises:
        DataError: It cannot be read, or a row lacks one of the columns.
    """
    text = read_text(path, "table")
    first, _, rest = text.partition("\n")
    if re.fullmatch(r"sep=[,;\t|]\s*", first):  # Excel's own first line
        text = rest
    titles: list[str] = []
    problem = ""
    if text.lstrip()[:1] in ("{", "["):
        rows = _json_rows(text, path)
        titles = list(dict.fromkeys(title for row in rows for title in row))
        if all(column in titles for column in columns):
            return rows, titles
    for delimiter in DELIMITERS if not titles else "":
        try:
            # The csv module wants whole lines with their ends, or fields with line breaks would be torn.
            lines = list(_csv_lines(text, delimiter))
        except csv.Error as error:  # it may be due to another delimiter
            problem = problem or str(error)
            continue
        found = [title.strip() for title in lines[0][1]] if lines else []
        if all(column in found for column in columns):
            _check_fields(lines, found, columns, path)
            return [dict(zip(found, line, strict=False)) for _, line in lines[1:]], found
        titles = found if len(found) > len(titles) else titles
    if problem:
        raise DataError(f"{path}, {problem}; save it as CSV in UTF-8")
    return None, titles


def _csv_lines(text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the number of the last line and the fields of each row that is not empty."""
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    # The csv module wants whole lines with their ends, or fields with line breaks would be torn.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    try:
        for fields in reader:
            if any(field.strip() for field in fields):
                yield reader.line_num, fields
    except csv.Error as error:
        open_quote = "a quote is left open" if "unexpected end" in str(error) else str(error)
        raise csv.Error(f"line {reader.line_num}: {open_quote}") from None


def _check_fields(
    lines: Sequence[tuple[int, list[str]]], titles: Sequence[str], columns: Sequence[str], path: Path
) -> None:
    """Refuse what would be read as another image or another label than was meant."""
    if twice := [column for column in columns if titles.count(column) > 1]:
        raise DataError(f"{path} has {titles.count(twice[0])} columns {twice[0]!r}; rename all but one")
    places = [titles.index(column) for column in columns]
    for number, fields in lines[1:]:
        if any(field.strip() for field in fields[len(titles) :]):
            raise DataError(
                f"{path}, line {number}: {len(fields)} fields, but {len(titles)} titles; put a field that holds the"
                " separator in quotes"
            )
        if any("\n" in fields[place] or "\r" in fields[place] for place in places if place < len(fields)):
            raise DataError(f"{path}, line {number}: the image or the label has a line break; a quote may be left open")


def _json_rows(text: str, path: Path) -> list[Mapping[str, Any]]:
    try:
        if text.lstrip()[0] == "[":
            rows = json.loads(text)
        else:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON, an object a line ({type(error).__name__}: {error}); repair it") from None
    if not all(isinstance(row, dict) for row in rows):
        raise DataError(f'{path} has lines that are no objects; expected {{"image": …, "label": …}} a line')
    return rows
