"""The page about a GPU that `make gpu-check` writes: docs/gpu/DEVICE.md from DEVICE.json."""

from collections.abc import Mapping
from typing import Any


def page(values: Mapping[str, Any]) -> str:
    """Return the page in Markdown.

    Args:
        values: The JSON object of a device.
    """
    failed = "".join(f"- {name}: {sentence}\n" for name, sentence in values["failed"].items()) or "Nothing.\n"
    rows = "".join(
        f"| {name} | {value if isinstance(value, str) else f'{value:.4g}'} |\n"
        for name, value in values.items()
        if name not in ("device", "failed")
    )
    table = f"| what | found |\n| --- | --- |\n{rows}"
    return f"# {values['device']}\n\nWritten by `make gpu-check`.\n\n## What failed\n\n{failed}\n## What was found\n\n{table}"
