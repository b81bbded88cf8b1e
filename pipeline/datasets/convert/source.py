"""What is converted: a source of images with their keys, classes and labels, and what of it is left out."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple, Protocol

from pipeline.datasets.formats import FOREIGN_EXTENSIONS, HEAD, IMAGE_EXTENSIONS, extension_of, format_of
from pipeline.datasets.text import shown, storable
from pipeline.errors import DataError

LeftOut = dict[str, list[str]]  # names of what is no part of the dataset, by the reason


class Problem(NamedTuple):
    """Why one image cannot be converted: a kind, which the table counts, and the details."""

    kind: str
    detail: str


class Source(Protocol):
    """Images to convert.

    A source reaches worker processes by fork, so it may hold arrays but no open files.

    Attributes:
        name: What messages call it.
        classes: Names of the classes; a label is an index into them. Empty if nothing has a label.
        keys: Names of the samples, without a dot in the last component, since WebDataset ends a key there. They are
            unique except for those in `problems`.
        labels: Class of each sample; -1 where it is unknown.
        in_order: Whether reading in another order is slow. If not, the conversion shuffles.
        names: What messages call each sample, for example its path; empty = its key.
        files: The files that the images come from. A conversion notices when they change. Empty = the images are made
            here and need no check.
        problems: Why some of the items cannot be converted, as far as it is known before they are read.
        left_out: What was found beside the samples.
    """

    name: str
    classes: Sequence[str]
    keys: Sequence[str]
    labels: Sequence[int]
    in_order: bool
    names: Sequence[str] = ()
    files: Sequence[str] = ()
    problems: Mapping[int, Problem] = MappingProxyType({})
    left_out: Mapping[str, Sequence[str]] = MappingProxyType({})

    def read(self, item: int) -> tuple[str, bytes]:
        """Return the file extension and the bytes of the image `keys[item]`."""


class UnreadableSource(DataError):
    """One file of a source cannot be read or is no image; others may be fine."""


@dataclass
class Files(Source):
    """Image files on disk, a `Source`; `paths` are their full paths."""

    name: str
    classes: Sequence[str]
    keys: Sequence[str]
    labels: Sequence[int]
    paths: Sequence[str]
    names: Sequence[str] = ()
    problems: Mapping[int, Problem] = field(default_factory=dict)
    left_out: Mapping[str, Sequence[str]] = field(default_factory=dict)
    in_order: bool = False

    @property
    def files(self) -> Sequence[str]:  # type: ignore[override]
        """The image files themselves, one per item."""
        return self.paths

    def read(self, item: int) -> tuple[str, bytes]:
        """Return the file extension and the bytes of one image."""
        path = self.paths[item]
        try:
            with open(path, "rb") as file:
                data = file.read()
        except OSError as error:
            raise UnreadableSource(
                f"{shown(path)} cannot be read ({error.strerror}); repair or remove it, then convert again"
            ) from None
        return stored_extension(path, data), data


def stored_extension(name: str, data: bytes) -> str:
    """Return the extension of an image in a shard: its own ending if it is an image's, else that of its content.

    Raises:
        UnreadableSource: The format is known, but not read.
    """
    extension = extension_of(name)
    if extension in FOREIGN_EXTENSIONS:
        raise UnreadableSource(f"{shown(name)} has the format {extension}, which is not read; save it as JPEG or PNG")
    if extension in IMAGE_EXTENSIONS:
        return extension
    found = format_of(data[:HEAD])
    if found not in IMAGE_EXTENSIONS:
        what = (
            f"has the format {found}, which is not read" if found else "is no image, neither by ending nor by content"
        )
        raise UnreadableSource(f"{shown(name)} {what}; save it as JPEG or PNG")
    return found


def make_keys(names: Sequence[str]) -> tuple[list[str], dict[int, Problem]]:
    """Make sample keys of file names: without the ending of an image, and with _ for every other dot.

    Images that would share a key keep their ending in it: `a.jpg` and `a.png` become `a_jpg` and `a_png`.

    Args:
        names: Paths with `/`, as the file system names them.

    Returns:
        The keys; and the problems: names that no shard can hold, and names whose key another name has already.
    """
    keys = [_key(storable(name)) for name in names]
    shared = {key for key, count in Counter(keys).items() if count > 1}
    keys = [_whole_key(storable(name)) if key in shared else key for key, name in zip(keys, names, strict=True)]
    problems: dict[int, Problem] = {}
    first: dict[str, int] = {}
    for item, (key, name) in enumerate(zip(keys, names, strict=True)):
        if "\\" in name:
            problems[item] = Problem("backslash in the name", f"{shown(name)}: a name cannot hold a backslash")
        elif (other := first.setdefault(key, item)) != item:
            text = f"{shown(names[other])} and {shown(name)} would both be sample {key!r}"
            problems[item] = Problem("duplicate name", text)
    return keys, problems


def _key(name: str) -> str:
    folder, slash, file = name.rpartition("/")
    stem = file.rpartition(".")[0] if extension_of(file) in (*IMAGE_EXTENSIONS, *FOREIGN_EXTENSIONS) else file
    return folder + slash + stem.replace(".", "_")


def _whole_key(name: str) -> str:
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.replace(".", "_")
