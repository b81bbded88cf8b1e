"""Write docs/reference/config.md from the config schemas, so that every key is documented in one place: its `Field`.

Commands: `python -m docs.reference.generate` writes the page; with `--check` it fails if the page is stale.
"""

import inspect
import re
import sys
import types
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from launchers.config import ClusterConfig
from pipeline.datasets.config import SplitConfig
from stages import SPECS

PAGE = Path(__file__).parent / "config.md"
# name -> (heading, schema, what the keys are for)
ROOTS: dict[str, tuple[str, type[BaseModel], str]] = {
    **{
        name: (f"Stage {spec.number}: `{name}`", spec.config, f"Files: `configs/{name}/*.yaml`.")
        for name, spec in SPECS.items()
    },
    "cluster": ("Cluster", ClusterConfig, "Files: `configs/cluster/*.yaml`; on a command line `cluster:key=value`."),
    "split": (
        "Split",
        SplitConfig,
        "Options of `vmp data split`: the key `ood_classes` is the option `--ood-classes`.",
    ),
}
HEAD = """\
<!-- Generated from the schemas by `make docs-reference`. Edit the descriptions in the code, not this page. -->
# Config reference

This page lists every key of every config: its type, its default and its meaning. A nested key is written with dots, as
on the command line: `optim.lr=1e-3`. An unknown key is refused before anything starts.

"""
IDENTITY = """\
A key marked † may change between two starts of one run. Another value of any other key is another run. A dataset or a
parent may move, but what it holds must stay the same: hashes are compared.

"""
NAMES: dict[Any, str] = {bool: "true or false", int: "integer", float: "number", str: "text", Path: "path"}
SIGNS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}


class Section:
    """One schema, and where it is used."""

    def __init__(self, schema: type[BaseModel]) -> None:
        self.schema = schema
        self.paths: dict[str, list[str]] = {}  # dotted path -> names of the roots that have it

    @property
    def heading(self) -> str:
        """The paths and the name of the schema."""
        return f"{', '.join(f'`{path}`' for path in self.paths)} ({self.schema.__name__})"

    @property
    def anchor(self) -> str:
        """The fragment that GitHub and mkdocs both make of the heading."""
        return re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", self.heading).strip().lower())


def page() -> str:
    """The whole page as Markdown."""
    sections: dict[type[BaseModel], Section] = {}
    for name, (_, schema, _) in ROOTS.items():
        for path, nested in _nested(schema):
            roots = sections.setdefault(nested, Section(nested)).paths.setdefault(path, [])
            if name not in roots:
                roots.append(name)
    parts = [_root(name, sections) for name in ROOTS]
    parts.append("## Nested keys\n\n")
    parts += [_section(section, sections) for section in sections.values()]
    body = "".join(parts)
    return HEAD + (IDENTITY if "†" in body else "") + body.rstrip() + "\n"


def _root(name: str, sections: Mapping[type[BaseModel], Section]) -> str:
    heading, schema, files = ROOTS[name]
    return f"## {heading}\n\n{files}\n\n{_about(schema)}{_table(schema, sections)}"


def _section(section: Section, sections: Mapping[type[BaseModel], Section]) -> str:
    used = "; ".join(f"`{path}` in {', '.join(roots)}" for path, roots in section.paths.items())
    about = f"{_about(section.schema)}Used as {used}."
    return f"### {section.heading}\n\n{about}\n\n{_table(section.schema, sections)}{_variants(section)}"


def _about(schema: type[BaseModel]) -> str:
    """The docstring without its `Attributes:` and the like."""
    text = re.split(r"\n\n(?:Args|Attributes|Raises|Returns|Note|Example)s?:\n", inspect.getdoc(schema) or "")[0]
    return f"{text}\n\n" if text and "Strict" not in text else ""


def _variants(section: Section) -> str:
    variants: Mapping[str, Mapping[str, Any]] = getattr(section.schema, "variants", {})
    if not variants:
        return ""
    rows = "".join(f"| `{name}` | {_value(dict(values))} |\n" for name, values in variants.items())
    return f"A `name` below sets these values; a key in the file overrides one.\n\n| name | values |\n| --- | --- |\n{rows}\n"


def _table(schema: type[BaseModel], sections: Mapping[type[BaseModel], Section]) -> str:
    rows = ["| key | type | default | description |", "| --- | --- | --- | --- |"]
    for key, field in schema.model_fields.items():
        kind = _type(field.annotation, _constraints(field.metadata), sections)
        extra = field.json_schema_extra
        mark = " †" if isinstance(extra, dict) and extra.get("identity") is False else ""
        cells = (f"`{key}`{mark}", kind, _default(schema, field), field.description or "")
        rows.append(f"| {' | '.join(_cell(cell) for cell in cells)} |")
    return "\n".join(rows) + "\n\n"


def _cell(text: str) -> str:
    """One line, with bars escaped."""
    return " ".join(text.split()).replace("|", r"\|")


def _nested(schema: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """(dotted path, schema) of everything below `schema`."""
    for key, field in schema.model_fields.items():
        for model in schemas_in(field.annotation):
            yield prefix + key, model
            yield from _nested(model, f"{prefix}{key}.")


def schemas_in(annotation: Any) -> list[type[BaseModel]]:
    """The schemas that a value of this type may be."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in schemas_in(argument)]


def _constraints(metadata: Any) -> str:
    """For example `> 0`; empty without any."""
    found = [f"{sign} {getattr(m, name):g}" for name, sign in SIGNS.items() for m in metadata if hasattr(m, name)]
    found += [f"matches `{m.pattern}`" for m in metadata if getattr(m, "pattern", None)]
    return " and ".join(found)


def _type(annotation: Any, limits: str, sections: Mapping[type[BaseModel], Section]) -> str:
    """The type in words, its limits and, for a schema, a link to it."""

    def inner(argument: Any) -> str:
        return _type(argument, limits, sections)

    arguments = get_args(annotation)
    origin = get_origin(annotation)
    if origin is Annotated:
        return _type(arguments[0], _constraints(arguments[1:]) or limits, sections)
    if origin in (Union, types.UnionType):
        return " or ".join(inner(argument) for argument in arguments)
    if origin is Literal:
        return ", ".join(f"`{_plain(argument)}`" for argument in arguments)
    if origin is tuple and arguments[-1] is Ellipsis:
        return f"list of {inner(arguments[0])}"
    if origin is tuple:
        kinds = [inner(argument) for argument in arguments]
        return f"{len(kinds)} x {kinds[0]}" if len(set(kinds)) == 1 else f"[{', '.join(kinds)}]"
    if origin in (dict, Mapping):
        return f"mapping of name to {inner(arguments[1])}"
    if origin is list:
        return f"list of {inner(arguments[0])}"
    if annotation in (None, type(None)):
        return "`null`"
    if annotation in sections:
        return f"[{annotation.__name__}](#{sections[annotation].anchor})"
    name = NAMES.get(annotation, getattr(annotation, "__name__", str(annotation)))
    return f"{name} {limits}" if limits and annotation is not bool else name


def _default(schema: type[BaseModel], field: FieldInfo) -> str:
    if field.is_required():
        return "from `name`" if getattr(schema, "variants", None) and field.annotation is not str else "required"
    return _value(field.get_default(call_default_factory=True, validated_data={}))


def _value(value: Any) -> str:
    if isinstance(value, BaseModel):
        changed = {
            key: getattr(value, key)
            for key, field in type(value).model_fields.items()
            if field.is_required()
            or getattr(value, key) != field.get_default(call_default_factory=True, validated_data={})
        }
        return _value(changed) if changed else "its defaults"
    return f"`{_plain(value)}`"


def _plain(value: Any) -> str:
    """As it is written in YAML."""
    if isinstance(value, Enum):
        return _plain(value.value)
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_plain(v)}" for key, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_plain(v) for v in value)}]"
    return '""' if value == "" else str(value)


def main(arguments: list[str]) -> int:
    """Write or check the page; 1 if it is stale."""
    wanted = page()
    if "--check" not in arguments:
        PAGE.write_text(wanted)
        return 0
    if not PAGE.is_file() or PAGE.read_text() != wanted:
        print(f"error: {PAGE.name} differs from the config schemas; type: make docs-reference", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
