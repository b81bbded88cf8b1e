"""What a library's error says, in one line, also where it says nothing."""

import ast

import pytest

from pipeline.errors import first_line
from tests.conftest import ROOT


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("one\ntwo"), "one"),
        (ValueError(""), "ValueError"),
        (MemoryError(), "MemoryError"),
        (ValueError("\n"), "ValueError"),
        (RuntimeError("\n  two "), "two"),
        (ValueError("\x0b\x1c\u2028three"), "three"),
        (ValueError("x" * 1000), "x" * 200),
    ],
)
def test_it_is_the_first_line_with_words_or_the_name_of_the_class(error: Exception, said: str) -> None:
    assert first_line(error) == said


def unguarded(node: ast.AST) -> bool:
    """Whether code takes a line of the text of an error by its number; an empty text has none."""
    match node:
        case ast.Subscript(
            value=ast.Call(func=ast.Attribute(attr="splitlines", value=text)), slice=ast.Constant(value=0)
        ):
            return isinstance(text, ast.Call) and isinstance(text.func, ast.Name) and text.func.id == "str"
    return False


def test_no_other_place_takes_the_first_line_of_an_error() -> None:
    tops = ("pipeline", "stages", "launchers", "benchmarks", "studies")
    files = [path for top in tops for path in sorted((ROOT / top).rglob("*.py"))]
    assert [str(p.relative_to(ROOT)) for p in files if any(map(unguarded, ast.walk(ast.parse(p.read_text()))))] == []
    assert unguarded(ast.parse("str(error).splitlines()[0]").body[0].value)  # type: ignore[attr-defined]
