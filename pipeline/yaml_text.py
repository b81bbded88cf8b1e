"""Read the text of a config, and refuse what no person means by it (torch-free)."""

import re
from typing import Any

import yaml

from pipeline.errors import ConfigError

# A config is a page of text. Whatever is larger is no config, and PyYAML would read it for minutes.
MAX_CHARACTERS = 100_000
MAX_DEPTH = 20


class _Loader(yaml.SafeLoader):
    """SafeLoader for configs.

    It reads `1e-3` as a number (YAML 1.1 wants `1.0e-3`) and a date as text. It refuses a key given twice, tags, aliases
    (a few of them can stand for 10^9 values) and deep nesting.
    """

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        line = f"line {event.start_mark.line + 1}"
        if isinstance(event, yaml.AliasEvent):
            raise ConfigError(f"{line}: aliases such as *{event.anchor} are not allowed; write the value out")
        if getattr(event, "tag", None) is not None:
            raise ConfigError(f"{line}: tags such as {event.tag} are not allowed; write a plain value")
        if self._depth >= MAX_DEPTH:
            raise ConfigError(f"{line}: nested more than {MAX_DEPTH} levels deep; no config needs that")
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_yaml_int(self, node: yaml.ScalarNode) -> Any:
        try:
            return super().construct_yaml_int(node)
        except ValueError:
            shown = f"{node.value[:20]}..." if len(node.value) > 20 else node.value
            raise ConfigError(f"line {node.start_mark.line + 1}: {shown} is no number that can be read") from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float | bool):
                raise ConfigError(f"line {key_node.start_mark.line + 1}: a key must be a word, got {key!r}")
            if key in seen:
                raise ConfigError(f"line {key_node.start_mark.line + 1}: key {key!r} is given twice; keep one")
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$|^[-+]?\.\d+[eE][-+]?\d+$"),
    list("-+0123456789."),
)

# A date, as in `experiment: 2026-01-31`, stays the text it is. The table is copied, because it belongs to SafeLoader.
_Loader.yaml_implicit_resolvers = {
    first: [rule for rule in rules if rule[0] != "tag:yaml.org,2002:timestamp"]
    for first, rules in _Loader.yaml_implicit_resolvers.items()
}

# YAML 1.1 reads 2:00:00 as the number 7200 (base 60); a time stays the text it is.
for _digit in "0123456789":
    _Loader.yaml_implicit_resolvers[_digit].insert(0, ("tag:yaml.org,2002:str", re.compile(r"^\d+(:\d\d)+$")))


def parse_yaml(text: str, where: str) -> Any:
    """Parse a YAML text into plain values.

    Args:
        text: The YAML.
        where: Names the text in an error message, for example the path of its file.

    Raises:
        ConfigError: The text is not YAML, or gives a key twice.
    """
    if len(text) > MAX_CHARACTERS:
        raise ConfigError(f"{where}: {len(text)} characters are no config; at most {MAX_CHARACTERS} are read")
    try:
        return yaml.load(text, Loader=_Loader)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    except yaml.reader.ReaderError as error:
        raise ConfigError(f"{where}: not valid YAML (it holds the character {error.character!r})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{where}{line}: not valid YAML ({getattr(error, 'problem', error)})") from None
    except (ValueError, OverflowError, RecursionError) as error:
        raise ConfigError(f"{where}: a value cannot be read ({type(error).__name__})") from None
