"""Read YAML and dotted overrides into frozen pydantic models, and refuse mistakes in words that a person can act on.

This module imports nothing heavy: a misspelt key is refused before torch is loaded. Every package keeps its schemas in
its own torch-free `config.py`; all of them derive from `Strict`.
"""

import difflib
import re
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import ErrorDetails

from pipeline.errors import ConfigError
from pipeline.yaml_text import MAX_CHARACTERS, MAX_DEPTH, parse_yaml

_MAX_NAME = 255  # bytes of one file name on every common file system
_UNUSABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
_MAX_SHOWN = 120  # characters of a wrong value in an error message

# Numbers that no knob exceeds. A knob whose number costs memory or time has a closer bound of its own.
PositiveInt = Annotated[int, Field(gt=0, le=10**9)]
NonNegativeInt = Annotated[int, Field(ge=0, le=10**9)]
Seconds = Annotated[float, Field(gt=0, le=10**7)]


def usable_path(value: str | Path) -> str | Path:
    """Return a path unchanged if the operating system can look it up.

    Raises:
        ValueError: It holds a character that no path can hold, or a name that is too long.
    """
    text = str(value)
    if _UNUSABLE.search(text):
        raise ValueError("a path can hold no control characters and no bytes that are not UTF-8")
    longest = max(len(name.encode()) for name in text.split("/"))
    if longest > _MAX_NAME or len(text) > 4000:
        raise ValueError(f"a name in this path has {longest} bytes; file systems take {_MAX_NAME}")
    return value


# The path of a file or folder as text, for knobs that also take a name.
PathText = Annotated[str, StringConstraints(min_length=1), AfterValidator(usable_path)]


class Strict(BaseModel):
    """Base of all schemas: refuses unknown keys, is frozen, and validates defaults like given values."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, protected_namespaces=(), allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Pydantic takes true for 1, and YAML takes `off` for false."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and bool not in (annotation, *get_args(annotation)):
            raise ValueError(
                f"{str(value).lower()} is not allowed here; give a number or a name"
                " (YAML reads on, off, yes and no as true and false)"
            )
        if isinstance(value, Path) or (isinstance(value, str) and Path in (annotation, *get_args(annotation))):
            if not str(value):
                raise ValueError("expected a path, got nothing; write null for none where the knob allows it")
            return usable_path(value)
        return value


M = TypeVar("M", bound=BaseModel)

# Old name of a key -> its name now. Nothing reads the old name: the refusal of an unknown key says the new one.
RENAMED = {"lanes": "virtual_readers", "probe": "linear_probe"}


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return a copy of `values` with each override set.

    Args:
        values: Nested mappings.
        overrides: Words such as `a.b=1`; the right side is read as YAML and replaces the whole value.
    """
    merged = _copy(values)
    for override in overrides:
        path, equals, text = override.partition("=")
        shown = _short(override)
        if not equals or not path or not all(path.split(".")) or path.count(".") >= MAX_DEPTH:
            raise ConfigError(f"override {shown}: expected key=value, for example optim.lr=1e-3")
        node = merged
        *parents, leaf = path.split(".")
        for parent in parents:
            child = node.setdefault(parent, {})
            if not isinstance(child, dict):
                child = node[parent] = {}
            node = child
        node[leaf] = parse_yaml(text, f"override {shown}")
    return merged


def config_folders() -> list[Path]:
    """The folders that hold config files, nearest first: `./configs`, a checkout's, an installed wheel's.

    Returns:
        Those that exist. A wheel carries the files in `pipeline/_configs`.
    """
    package = Path(__file__).resolve().parent
    folders = (Path("configs"), package.parent / "configs", package / "_configs")
    return [folder for folder in folders if folder.is_dir()]


def find_config(path: Path) -> Path:
    """Where a config file lies: in the current folder, or among the files that came with the package.

    Args:
        path: As typed, for example `configs/arm/demo.yaml`.

    Returns:
        `path` itself if it exists; else the packaged file of that name; `path` again if there is neither.
    """
    if _is_file(path) or path.is_absolute():
        return path
    name = path.relative_to("configs") if path.parts[:1] == ("configs",) else path
    return next((found for folder in config_folders() if (found := folder / name).is_file()), path)


def _is_file(path: Path) -> bool:
    try:
        return Path(usable_path(path)).is_file()
    except (ValueError, OSError) as error:  # a folder above it may be closed to us
        raise ConfigError(f"config {_short(str(path))} cannot be looked up: {_short(str(error))}") from None


def packaged_configs(group: str) -> list[Path]:
    """List the config files of a stage (or `cluster`) in the first folder that has any, as `configs/STAGE/NAME.yaml`."""
    for folder in config_folders():
        if found := sorted((folder / group).glob("*.yaml")):
            return [Path("configs", group, path.name) for path in found]
    return []


def read_values(path: Path) -> dict[str, Any]:
    """Read a config file as plain values, those of its `base:` file included.

    `base: other.yaml` names a file relative to this one. Its values hold wherever this file gives none: mappings are
    merged key by key, everything else is replaced (`null` removes a section). The base must not have a base itself.

    Args:
        path: The file, looked up by `find_config`.

    Returns:
        The values, without the key `base`.

    Raises:
        ConfigError: A file is missing, is no YAML mapping, or its base has a base.
    """
    path = find_config(path)
    values = _read_mapping(path)
    if "base" not in values:
        return values
    name = values.pop("base")
    if not isinstance(name, str):
        raise ConfigError(f"{path}: base = {name!r}; it must name a YAML file in or relative to {path.parent}")
    below = _read_mapping(path.parent / name)
    if "base" in below:
        raise ConfigError(
            f"{path}: its base {name} has a base itself ({below['base']}); only one level is allowed: name"
            f" {below['base']} here and repeat the values of {name} that you need"
        )
    return _merge(below, values)


def _read_mapping(path: Path) -> dict[str, Any]:
    if not _is_file(path):
        near = sorted(path.parent.glob("*.yaml")) if path.parent.is_dir() else packaged_configs(path.parent.name)
        known = (
            f"; there are {', '.join(str(p) for p in near)}" if near else "; `vmp configs` lists those of the package"
        )
        raise ConfigError(f"config {path} does not exist{known}")
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_CHARACTERS + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config {path} cannot be read as text: {error}") from None
    values = parse_yaml(text, str(path)) or {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of keys, got {type(values).__name__}")
    return values


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        merged[key] = _merge(under, value) if isinstance(value, dict) and isinstance(under, dict) else value
    return merged


def load_config(schema: type[M], path: Path, overrides: Sequence[str] = ()) -> M:
    """Read a config file, apply the overrides and validate the result.

    Args:
        schema: The pydantic model that the file must fit.
        path: The file; see `find_config` and `read_values`.
        overrides: Words of the form `key=value`, for example `optim.lr=1e-3`.

    Raises:
        ConfigError: Names all problems at once.
    """
    return validate(schema, apply_overrides(read_values(path), overrides), str(path))


def validate(schema: type[M], values: dict[str, Any], where: str) -> M:
    """Validate `values` against `schema`.

    Args:
        schema: A pydantic model.
        values: Nested mappings.
        where: Names the source of the values in an error message.

    Raises:
        ConfigError: Has one line for each problem.
    """
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        lines = list(dict.fromkeys(_explain(schema, detail) for detail in error.errors()))
        head = f"{where}: {len(lines)} problem{'s' if len(lines) > 1 else ''}"
        raise ConfigError("\n  ".join([head, *lines])) from None


def nearest(name: str, known: Sequence[str]) -> list[str]:
    """Sort the `known` names by their likeness to `name`, the most alike first."""
    return sorted(known, key=lambda k: -difflib.SequenceMatcher(None, name, k).ratio())


def choose(kind: str, name: str, table: dict[str, Any]) -> Any:
    """Return `table[name]`.

    Raises:
        ConfigError: The name is unknown; lists the known ones, the most alike first.
    """
    if name not in table:
        raise ConfigError(f"unknown {kind} {name!r}; known: {', '.join(nearest(name, list(table)))}")
    return table[name]


def _copy(node: Any) -> Any:
    return {k: _copy(v) for k, v in node.items()} if isinstance(node, dict) else node


def _explain(schema: type[BaseModel], detail: ErrorDetails) -> str:
    """One line that names the key, the value and the remedy."""
    # The location contains tags of unions, which are not keys of the file.
    location = [str(part) for part in detail["loc"] if not str(part).startswith("function-")]
    path = [part for part in location if not part.startswith("tagged-")]
    name = ".".join(path)
    if detail["type"] == "extra_forbidden":
        known = _keys_at(schema, location[:-1])
        if (new := RENAMED.get(path[-1])) in known:
            return f"{name}: this key is called {new} now; write {'.'.join([*path[:-1], new])}"
        close = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}? " if close else ""
        return f"{name}: unknown key; {hint}(known: {', '.join(nearest(path[-1], known))})"
    if detail["type"] == "missing":
        return f"{name}: missing; add it to the file or give {name}=... on the command line"
    message = detail["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if not name:
        return message
    value = detail["input"]
    shown = f" = {_short(value)}" if not isinstance(value, dict | BaseModel) else ""
    return f"{name}{shown}: {message[0].lower()}{message[1:]}"


def _short(value: Any) -> str:
    """Return a value as text that fits in a sentence."""
    try:
        text = repr(value)
    except ValueError:  # Python prints no integer of more than 4300 digits
        text = "a number of thousands of digits"
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def _keys_at(schema: type[BaseModel], path: Sequence[str]) -> list[str]:
    """Return the field names of every schema that `path` may lead to."""
    schemas: list[type[BaseModel]] = [schema]
    for part in path:
        if part.startswith("tagged-"):  # a union by name: the tag says which of its schemas was chosen
            schemas = [model for model in schemas if model.__name__ == part.removeprefix("tagged-")]
            continue
        found: list[type[BaseModel]] = []
        for model in schemas:
            if part in model.model_fields:
                found += _models_in(model.model_fields[part].annotation)
        schemas = found or schemas
    return list(dict.fromkeys(field for model in schemas for field in model.model_fields))


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, types.UnionType) or get_args(annotation):
        return [model for arg in get_args(annotation) for model in _models_in(arg)]
    return []
