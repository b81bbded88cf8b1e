"""What a check found, as values, and the words for it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

_MAX_NAMES = 8  # classes that a sentence names

Level = Literal["grave", "warning", "note"]


class Example(NamedTuple):
    """An image of a finding: the place of its dataset in the list of datasets, its sample index, and what to say of it."""

    dataset: int
    sample_index: int
    caption: str = ""


class Group(NamedTuple):
    """Images that belong together: the first of them, and how many more there are."""

    examples: list[Example]
    more: int = 0


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that was found.

    Attributes:
        name: A short name in lower case with hyphens; it does not change between versions of the text.
        level: `grave` if results would be wrong, `warning` if something probably should be changed, `note` otherwise.
        title: Heading.
        text: Whole sentences.
        count: How many images or classes it concerns.
        groups: Examples.
    """

    name: str
    level: Level
    title: str
    text: str
    count: int
    groups: list[Group] = field(default_factory=list)


def images(count: int) -> str:
    """Return `1 image` or `N images`."""
    return f"{count:,} image{'s' if count != 1 else ''}"


def are(count: int) -> str:
    """Return the verb for a number of things."""
    return "is" if count == 1 else "are"


def listed(names: Sequence[str]) -> str:
    """Return the first names, and how many there are more."""
    more = len(names) - _MAX_NAMES
    return ", ".join(names[:_MAX_NAMES]) + (f" and {more} more" if more > 0 else "")


def shortened(name: str, length: int = 40) -> str:
    """Return a name that fits a line and can be printed; both its ends are kept, since a file is known by its last letters."""
    name = printable(name)
    return name if len(name) <= length else f"{name[: length // 2 - 3]}...{name[-(length - length // 2) :]}"


def printable(text: str) -> str:
    """Return a text with ? for what a terminal or UTF-8 cannot show."""
    return "".join(c if c.isprintable() else "?" for c in text)
