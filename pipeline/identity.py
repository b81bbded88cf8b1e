"""What of a config is the identity of its run, and the config as a run writes it down."""

from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

# At a knob, `Field(..., json_schema_extra=FROM_DATA)` says that a run takes it from its data, whatever the default is.
FROM_DATA: dict[str, Any] = {"from_data": True}

# At a knob, `Field(..., json_schema_extra=FREE)` says that it may change between two starts of one run: it decides where,
# how fast or how closely watched the run is, and none of its numbers.
FREE: dict[str, Any] = {"identity": False}


def dump_yaml(config: BaseModel) -> str:
    """Return the resolved config as YAML, which starts an equal run: every field, in the order of the schema.

    A field that the data gives (`FROM_DATA`) is left out unless the config names it, since its default says nothing.
    """
    return yaml.safe_dump(_written(config, config.model_dump(mode="json")), sort_keys=False)


def _written(config: BaseModel, values: dict[str, Any]) -> dict[str, Any]:
    for name, field in type(config).model_fields.items():
        child = getattr(config, name)
        if _is(field, "from_data", True) and name not in config.model_fields_set:
            del values[name]
        elif isinstance(child, BaseModel):
            _written(child, values[name])
    return values


def identity(config: BaseModel) -> dict[str, Any]:
    """Return the values that decide the numbers of a run, with dotted keys: every field that is not declared FREE.

    A field that the data give (`FROM_DATA`) counts only where the config names it: inputs count by their hashes.
    """
    values = config.model_dump(mode="json")
    found: dict[str, Any] = {}
    for name, field in type(config).model_fields.items():
        child = getattr(config, name)
        if _is(field, "identity", False) or (_is(field, "from_data", True) and name not in config.model_fields_set):
            continue
        if isinstance(child, BaseModel):
            found |= {f"{name}.{key}": value for key, value in identity(child).items()}
        else:
            found |= flatten(values[name], name)
    return found


def _is(field: FieldInfo, key: str, value: bool) -> bool:
    extra = field.json_schema_extra
    return isinstance(extra, dict) and extra.get(key) is value


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings into one mapping with dotted keys."""
    if not isinstance(values, dict):
        return {prefix: values}
    return {
        k: v for key, child in values.items() for k, v in flatten(child, f"{prefix}.{key}" if prefix else key).items()
    }
