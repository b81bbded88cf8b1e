"""The files of recipes: they read back as they were meant, and an edit is noticed."""

from pathlib import Path

import yaml
from hypothesis import given
from hypothesis import strategies as st

from launchers.recipe.text import edited, render, set_aside

LEAVES = st.one_of(st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.booleans(), st.text(max_size=9))
VALUES = st.dictionaries(
    st.from_regex(r"k[a-z_]{1,8}", fullmatch=True),
    st.one_of(LEAVES, st.lists(LEAVES, max_size=3), st.dictionaries(st.text("ab", min_size=1), LEAVES, max_size=3)),
    max_size=5,
)


@given(VALUES, st.text(st.characters(exclude_categories=["C", "Z"]), max_size=300))
def test_what_is_written_is_read_and_counts_as_unedited(values: dict, reason: str) -> None:
    text = render(["Title", "", "More"], values, {key: [reason + " because."] for key in values})
    assert yaml.safe_load(text) == (values or None)
    assert not edited(text)
    assert edited(text.replace("Title", "Another title"))
    assert edited(text + "more: 1\n")
    assert max(map(len, text.splitlines())) < 10_000


def test_a_file_of_another_origin_counts_as_edited() -> None:
    assert edited("run: {experiment: mine}\n")


def test_an_edited_file_is_kept_beside_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    for content in ("first", "second"):
        path.write_text(content)
        set_aside(path)
    assert [(tmp_path / f"mine.yaml.{n}").read_text() for n in (1, 2)] == ["first", "second"]
