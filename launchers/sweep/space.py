"""What a sweep searches, as it is typed: `optim.lr=1e-4..1e-2:log`, `loop.steps=100..400`, `optim.kind=adamw,sgd`."""

import math
import re
from typing import Literal, NamedTuple, get_args

from pipeline.errors import ConfigError

Sampler = Literal["tpe", "random", "grid"]
SAMPLERS: tuple[Sampler, ...] = get_args(Sampler)
_KEY = re.compile(r"(?:[a-z]+:)?[A-Za-z_][\w.]*")
_EXAMPLE = "for example optim.lr=1e-4..1e-2:log, loop.steps=100..400 or pseudo.thresholds=fixed,softmatch"


class Axis(NamedTuple):
    """One key and the values that are tried.

    Attributes:
        key: As in an override, `distill:optim.lr` for one stage of a chain.
        choices: The values, if they are listed.
        low: Smallest value of a range; a range of whole numbers has whole bounds.
        high: Largest value of a range.
        log: Whether a range is searched on a logarithmic scale.
    """

    key: str
    choices: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False

    @property
    def whole(self) -> bool:
        """Whether a range has whole numbers only."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    def ends(self) -> tuple[str, ...]:
        """Return values that must be valid: all choices, or the two bounds."""
        return self.choices or (repr(self.low), repr(self.high))


def read_axes(words: list[str]) -> list[Axis]:
    """Read the axes of a sweep.

    Raises:
        ConfigError: There is none, a word is none, or a key is given twice.
    """
    if not words:
        raise ConfigError(f"a sweep needs keys to vary; give --over key=values, {_EXAMPLE}")
    axes = [_read(word) for word in words]
    keys = [axis.key for axis in axes]
    if repeated := next((key for key in keys if keys.count(key) > 1), None):
        raise ConfigError(f"--over {repeated} is given twice; give all of its values at once")
    return axes


def _read(word: str) -> Axis:
    key, equals, values = word.partition("=")
    if not equals or not _KEY.fullmatch(key) or not values:
        raise ConfigError(f"--over {word}: expected key=values, {_EXAMPLE}")
    if ".." not in values:
        choices = tuple(_split(values))
        if len(set(choices)) < 2 or not all(choices):
            raise ConfigError(f"--over {word}: give two or more different values, {_EXAMPLE}")
        return Axis(key, choices)
    span, colon, scale = values.partition(":")
    low, high = (_number(bound) for bound in span.split("..", 1))
    if low is None or high is None or not low < high or (colon and scale != "log"):
        raise ConfigError(f"--over {word}: expected LOW..HIGH or LOW..HIGH:log with LOW below HIGH, {_EXAMPLE}")
    if scale == "log" and low <= 0:
        raise ConfigError(f"--over {word}: a logarithmic scale begins above 0; raise {span.split('..')[0]}")
    whole = isinstance(low, int) and isinstance(high, int)
    return Axis(key, low=low if whole else float(low), high=high if whole else float(high), log=scale == "log")


def _split(values: str) -> list[str]:
    """Split at the commas that are outside of brackets and braces."""
    parts, depth = [""], 0
    for letter in values:
        depth += (letter in "[{(") - (letter in "]})")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def _number(text: str) -> float | None:
    try:
        return int(text)
    except ValueError:
        pass
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
