"""Prepare data, run stages and read their results, as a person would. The first failure ends the study."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.data import main as data
from pipeline.jsonl import read_rows
from tests import warm


def prepare(*arguments: str) -> None:
    """Run `python -m pipeline.data ARGUMENTS` in this process.

    Raises:
        SystemExit: It failed; with its exit code.
    """
    if code := data(list(arguments)):
        raise SystemExit(code)


def run(stage: str, recipe: str | Path, values: Sequence[str], *, name: str) -> None:
    """Run one stage in a process of its own with one thread, forked from one that has imported torch; say how it ended.

    A stage that is complete is reused. A folder that holds a run of another config is refused.

    Args:
        stage: `arm`, `distill` or `semi`.
        recipe: Name of a file, configs/STAGE/NAME.yaml, or its path.
        values: Overrides, `key=value`.
        name: What the line on standard error calls this run.

    Raises:
        SystemExit: The stage failed; with its exit code.
    """
    path = recipe if isinstance(recipe, Path) else Path(f"configs/{stage}/{recipe}.yaml")
    done = warm.run([sys.executable, "-m", "stages", stage, str(path), *values], cwd=Path.cwd())
    print(f"{name}: {done.stderr if done.returncode else 'done'}", file=sys.stderr, flush=True)
    if done.returncode:
        raise SystemExit(done.returncode)


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of a stage's metrics.jsonl."""
    return read_rows(folder / "metrics.jsonl")


def evaluation(folder: Path) -> dict[str, dict[str, Any]]:
    """Metrics on the test set by model (`student`, `teacher`, `average`), from a stage's evaluation.json."""
    models: dict[str, dict[str, Any]] = json.loads((folder / "evaluation.json").read_text())["models"]
    return models
