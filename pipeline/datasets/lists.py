"""Published lists of images: which samples of a dataset they name."""

import csv
import hashlib
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.datasets.formats import FOREIGN_EXTENSIONS, IMAGE_EXTENSIONS, extension_of
from pipeline.datasets.manifest import Manifest
from pipeline.datasets.places import imagefolder_order
from pipeline.datasets.text import decode_text, same_form, storable
from pipeline.errors import DataError

logger = logging.getLogger(__name__)

DELIMITERS = ",;\t"


def read_list(path: Path, manifest: Manifest) -> tuple[NDArray[np.int64], str]:
    """Find the samples that a text or CSV file names, one a line.

    A line names an image by its file name, with or without folders and extension; further columns are ignored
    (SimCLR's `1percent.txt`, ImageNet-LT's `train/n01440764/n01440764_190.JPEG 0`). The whole line is tried first, so names
    may hold spaces and commas. A name with folders never matches an image of another folder. Or all lines are bare
    numbers: the places in torchvision's ImageFolder, which sorts classes, then paths as the file system names them (the
    index files of EMAN and Semi-ViT). A first line that names nothing and looks like column titles is skipped.

    Args:
        path: The list; UTF-8 or UTF-16, with or without a byte order mark; `/` or backslashes.
        manifest: The dataset.

    Returns:
        (N,) sorted sample indices, and the SHA-256 of the file.

    Raises:
        DataError: The file is missing or empty, or a line names no sample, several, or the sample of another line.
    """
    if not path.is_file():
        raise DataError(f"list {path} does not exist; give a file with one image a line")
    content = path.read_bytes()
    lines = [line.strip() for line in decode_text(content, path, "list").splitlines() if line.strip()]
    titled = len(lines) > 1 and _looks_like_titles(lines[0]) and all(line.isdigit() for line in lines[1:])
    if lines and all(line.isascii() and line.isdigit() for line in lines[titled:]):
        found = _by_place(lines[titled:], manifest, path)
    else:
        found = _by_name(lines, manifest, path)
    if not found:
        raise DataError(f"list {path} names no image; give a file with one image a line")
    if repeated := len(found) - len(set(found)):
        raise DataError(f"list {path} names {repeated} images twice; remove the repeated lines")
    return np.sort(np.array(found)), hashlib.sha256(content).hexdigest()


def _by_place(lines: list[str], manifest: Manifest, path: Path) -> list[int]:
    order = imagefolder_order(manifest)
    numbers = [int(line) if len(line) < 19 else 10**18 for line in lines]
    if numbers and max(numbers) >= len(order):
        raise DataError(
            f"list {path} has number {max(numbers)}, but {len(order)} samples are counted from 0; is it another dataset's?"
        )
    logger.warning(
        "list %s holds bare numbers: they are read as places, from 0, in the order of torchvision's ImageFolder "
        "(classes by name, then paths); the first, %d, is %s",
        path,
        numbers[0],
        manifest.member(int(order[numbers[0]])),
    )
    return [int(order[number]) for number in numbers]


def _by_name(lines: list[str], manifest: Manifest, path: Path) -> list[int]:
    finder = _Finder(manifest)
    found, missing = [], []
    for number, line in enumerate(lines):
        matches = next((m for m in map(finder.find, _candidates(line)) if m), [])
        if len(matches) == 1:
            found.append(matches[0])
        elif number == 0 and not matches and len(lines) > 1 and _looks_like_titles(line):
            logger.warning("list %s: its first line, %r, names no image and is taken for column titles", path, line)
        else:
            missing.append(line)
    if missing:
        raise DataError(
            f"list {path}: {len(missing)} of {len(lines)} lines name no image of the dataset, or more than one; "
            f"the first: {missing[0]!r} (the dataset has names like {manifest.key(0)!r})"
        )
    return found


def _candidates(line: str) -> Iterator[str]:
    """Yield what may be the name in a line: the whole line, the column of names, the line without its last columns."""
    yield line
    yield line.strip("\"'")
    for delimiter in DELIMITERS:
        if delimiter in line:
            yield from _first_name(
                [f.strip() for f in next(csv.reader([line], delimiter=delimiter, skipinitialspace=True))]
            )
    pieces = line.split()
    prefixes = [" ".join(pieces[:count]) for count in range(len(pieces) - 1, 0, -1)]
    named = [prefix for prefix in prefixes if _is_image_name(prefix)]
    yield from named or [prefix for prefix in prefixes if not prefix.isdigit()]
    yield from _first_name(pieces)


def _first_name(fields: list[str]) -> list[str]:
    """Return the first field with the ending of an image; without one, the first that is no number."""
    named = [field for field in fields if _is_image_name(field)]
    return (named or [field for field in fields if field and not field.isdigit()])[:1]


def _is_image_name(text: str) -> bool:
    return extension_of(text.replace("\\", "/")) in (*IMAGE_EXTENSIONS, *FOREIGN_EXTENSIONS)


def _looks_like_titles(line: str) -> bool:
    """Return whether a line has no digit, no folder and no ending of an image."""
    fields = re.split(rf"[{DELIMITERS}\s]+", line)
    return not re.search(r"[\d/\\]", line) and not any(_is_image_name(field.strip("\"'")) for field in fields)


class _Finder:
    """Finds the samples that a path names: one of the two paths must be the end of the other."""

    def __init__(self, manifest: Manifest) -> None:
        self._by_base: dict[str, list[tuple[list[str], int]]] = {}
        for sample_index in range(manifest.num_samples):
            pieces = same_form(manifest.key(sample_index)).split("/")
            self._by_base.setdefault(pieces[-1], []).append((pieces, sample_index))

    def find(self, name: str) -> list[int]:
        """Return the indices of the samples whose key is this path; of those that match, the longest match counts."""
        path = same_form(storable(name.replace("\\", "/")))
        pieces = [piece for piece in path.split("/") if piece not in ("", ".")]
        if not pieces:
            return []
        for base in _bases(pieces[-1]):
            folders = [*pieces[:-1], base]
            matches: dict[int, list[int]] = {}
            for key, sample_index in self._by_base.get(base, []):
                common = min(len(key), len(folders))
                if key[-common:] == folders[-common:]:
                    matches.setdefault(common, []).append(sample_index)
            if matches:
                return matches[max(matches)]
        return []


def _bases(file: str) -> list[str]:
    """Return the last components of keys that a file name may have: without its ending, or with all of it."""
    whole = file.replace(".", "_")
    stem = file.rpartition(".")[0].replace(".", "_")
    if extension_of(file) in (*IMAGE_EXTENSIONS, *FOREIGN_EXTENSIONS):
        return [stem, whole]  # `whole` where images of several endings share the stem
    return [whole, stem] if stem else [whole]
