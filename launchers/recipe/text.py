"""The files of a recipe: YAML with the reasons above the values, and a digest that tells whether a person has edited it."""

import hashlib
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

WIDTH = 110
_MARK = re.compile(r"^# recipe: ([0-9a-f]{16})\n", re.MULTILINE)


def render(head: Sequence[str], values: Mapping[str, Any], reasons: Mapping[str, Sequence[str]]) -> str:
    """Return the text of a config file.

    Args:
        head: Lines of the comment at the top.
        values: The config's values.
        reasons: Key of `values` -> sentences that stand above it.
    """
    lines: list[str] = []
    for key, value in values.items():
        for sentence in reasons.get(key, ()):
            sentence = sentence[:1].upper() + sentence[1:]
            lines += textwrap.wrap(sentence, WIDTH, initial_indent="# ", subsequent_indent="#   ")
        lines.append(f"{key}: {_flow(value)}")
    body = "\n".join(lines) + "\n"
    top = "\n".join(f"# {line}".rstrip() for line in head)
    return f"{top}\n# recipe: {_digest(top, body)}\n{body}"


def edited(text: str) -> bool:
    """Whether a config file is other than a recipe wrote it."""
    found = _MARK.search(text)
    return found is None or found[1] != _digest(text[: found.start()].rstrip("\n"), text[found.end() :])


def set_aside(path: Path) -> Path:
    """Rename an edited file to NAME.yaml.1, .2, … and return the new path."""
    number = 1
    while (kept := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    return path.rename(kept)


def _flow(value: Any) -> str:
    dumped: str = yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False)
    return dumped.removesuffix("...\n").strip()


def _digest(top: str, body: str) -> str:
    return hashlib.sha256(f"{top}\n{body}".encode()).hexdigest()[:16]
