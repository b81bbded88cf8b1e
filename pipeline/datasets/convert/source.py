"""What is converted: a source of images with their keys, classes and labels."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pipeline.errors import DataError


class Source(Protocol):
    """Images to convert.

    A source reaches worker processes by fork, so it may hold arrays but no open files.

    Attributes:
        name: What messages call it.
        classes: Names of the classes; a label is an index into them.
        keys: Unique names of the samples, without a dot in the last component, since WebDataset ends a key there.
        labels: Class of each sample; -1 where it is unknown.
        in_order: Whether reading in another order is slow. If not, the conversion shuffles.
    """

    name: str
    classes: Sequence[str]
    keys: Sequence[str]
    labels: Sequence[int]
    in_order: bool

    def read(self, item: int) -> tuple[str, bytes]:
        """Return the file extension and the bytes of the image `keys[item]`."""


@dataclass
class Files:
    """Image files on disk, a `Source`; `paths` are their full paths."""

    name: str
    classes: Sequence[str]
    keys: Sequence[str]
    labels: Sequence[int]
    paths: Sequence[str]
    in_order: bool = False

    def read(self, item: int) -> tuple[str, bytes]:
        """Return the file extension and the bytes of one image."""
        path = self.paths[item]
        try:
            with open(path, "rb") as file:
                return Path(path).suffix[1:].lower(), file.read()
        except OSError as error:
            raise DataError(
                f"{path} cannot be read ({error.strerror}); repair or remove it, then convert again"
            ) from None


def keys_of(names: Sequence[str]) -> list[str]:
    """Make sample keys of file names: without the suffix, and with _ for every other dot.

    Raises:
        DataError: Two names would get the same key.
    """
    keys = []
    for name in names:
        folder, slash, file = name.rpartition("/")
        keys.append(folder + slash + file.rpartition(".")[0].replace(".", "_"))
    if len(set(keys)) < len(keys):
        first: dict[str, str] = {}
        for key, name in zip(keys, names, strict=True):
            if first.setdefault(key, name) != name:
                raise DataError(f"{first[key]} and {name} would both be sample {key!r}; rename one")
    return keys
