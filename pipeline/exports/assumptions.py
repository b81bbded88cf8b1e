"""What no shape of a released file tells: asked, read from the command line that the file stores, or assumed and said.

Training scripts store their arguments beside the weights (`args`). Two kinds of them are read:

- The model's name. Vim's names say all of it: `vim_tiny_patch16_224_bimambav2_..._with_midclstok_div2` has its cls token in
  the middle (`midclstok`) and divides the sum of the directions (`div2`). A name with another `cls_token` or `clstok` has it
  first, and one without `div2` sums.
- Keyword arguments of the model, if a script has stored them: `use_middle_cls_token`, `if_divide_out`, and ARM's
  `global_pool`.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from pipeline.errors import HandoverError

_VIM = re.compile(r"vim_\w*bimamba\w*")
_CLS = re.compile(r"(?<![a-z])(mid_?)?cls_?tok(en)?(?![a-z])")
_DIVIDED = re.compile(r"(?<![a-z])div2(?![0-9])")
# Words of Vim's names for what our model lacks and what no key of a file shows.
_LACKING = {"rope": "rotary position embeddings", "random_cls": "a cls token at random places"}


class Choice(NamedTuple):
    """A field of a model's config that the shapes leave open.

    Attributes:
        option: What a person types to decide it; empty if there is no such option.
        words: What each value means.
        flags: Arguments that decide it if they are stored: name -> (value if true, value if false).
    """

    option: str
    words: Mapping[str, str]
    flags: Mapping[str, tuple[str, str]]


CHOICES = {
    "cls_token": Choice(
        "--cls-position",
        {
            "middle": "the cls token stands in the middle of the patches",
            "first": "the cls token stands before the patches",
        },
        {"use_middle_cls_token": ("middle", "first")},
    ),
    "combine": Choice(
        "--combine",
        {
            "mean": "the outputs of the directions are averaged",
            "sum": "the outputs of the directions are added and not divided",
        },
        {"if_divide_out": ("mean", "sum"), "if_devide_out": ("mean", "sum")},  # both spellings occur
    ),
    "pool": Choice(
        "",
        {"mean": "the head reads the mean of the patches", "cls": "the head reads the cls token"},
        {"global_pool": ("mean", "cls")},
    ),
}


class Decision(NamedTuple):
    """How one field was decided.

    Attributes:
        field: Of the model's config.
        value: The field's value.
        reason: Why, for people.
        guessed: Whether neither a person nor the file decided it.
    """

    field: str
    value: str
    reason: str
    guessed: bool = False

    def __str__(self) -> str:
        """Say it in one sentence."""
        return f"{CHOICES[self.field].words[self.value]} ({self.field}={self.value}): {self.reason}"


def told_by(arguments: Mapping[str, Any]) -> dict[str, Decision]:
    """Return what stored arguments tell, by field.

    Args:
        arguments: As `read_checkpoint` returns them.

    Raises:
        HandoverError: They name a model with a part that ours lacks and that no key shows.
    """
    return {decision.field: decision for decision in (*_by_name(arguments.get("model")), *_by_flags(arguments))}


def decide(
    usual: Mapping[str, str], given: Mapping[str, str], arguments: Mapping[str, Any], *, certain: bool
) -> list[Decision]:
    """Decide every field that a layout leaves open: by what a person gave, by the file, or as released models are.

    Args:
        usual: The open fields, with the value of the models that the project released.
        given: What a person gave, by field.
        arguments: What the file stores beside its weights.
        certain: Whether the project has no other form, so that its usual one is no guess.

    Raises:
        HandoverError: A field was given that this layout does not leave open, or see `told_by`.
    """
    for field in given:
        if field not in usual:
            raise HandoverError(
                f"this layout leaves nothing open that {CHOICES[field].option} could decide; leave it out"
            )
    told, decisions = told_by(arguments), []
    for field, value in usual.items():
        if field in given:
            against = f", against what the file says ({told[field].reason})" if _differs(told, field, given) else ""
            decisions.append(Decision(field, given[field], f"given by {CHOICES[field].option}{against}"))
        elif field in told:
            decisions.append(told[field])
        elif certain:
            decisions.append(Decision(field, value, "the project's code has no other form"))
        else:
            hint = f"; if it is otherwise, give {CHOICES[field].option}" if CHOICES[field].option else ""
            decisions.append(
                Decision(field, value, f"assumed, as in the released models; the file does not say{hint}", guessed=True)
            )
    return decisions


def _differs(told: Mapping[str, Decision], field: str, given: Mapping[str, str]) -> bool:
    return field in told and told[field].value != given[field]


def _by_name(name: object) -> Iterator[Decision]:
    if not isinstance(name, str) or not _VIM.fullmatch(name := name.lower()):
        return
    name = name[:200]
    for word, meaning in _LACKING.items():
        if word in name:
            raise HandoverError(f"its model's name {name} says that it has {meaning}, which our model does not have")
    reason = f"the file's args.model is {name}"
    if found := _CLS.search(name):
        yield Decision("cls_token", "middle" if found[1] else "first", reason)
    yield Decision("combine", "mean" if _DIVIDED.search(name) else "sum", reason)


def _by_flags(arguments: Mapping[str, Any]) -> Iterator[Decision]:
    for field, choice in CHOICES.items():
        for flag, values in choice.flags.items():
            if isinstance(value := arguments.get(flag), bool):
                yield Decision(field, values[0 if value else 1], f"the file's args.{flag} is {value}")
