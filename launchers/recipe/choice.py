"""What a rule of a recipe gives: a value with its reason."""

from typing import Any, Literal, NamedTuple

Stage = Literal["arm", "distill", "semi"]


class Choice(NamedTuple):
    """A value and the reason for it, one sentence for the config file."""

    value: Any
    why: str
