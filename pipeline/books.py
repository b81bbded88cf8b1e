"""Small files of a run's folder that people and other commands read: its status and its config.

A kill or a full disk may have damaged them. Then they count as absent, with a warning, so no report or status ends in it.
"""

import logging
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.jsonl import read_object

logger = logging.getLogger(__name__)


class _Status(BaseModel):
    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    state: str = Field(max_length=40)
    time: float = Field(0.0, ge=0, le=1e11)
    step: int = Field(0, ge=0, lt=2**53)
    steps: int = Field(0, ge=0, lt=2**53)
    reason: str = ""


def read_status(run: Path) -> dict[str, Any]:
    """Return state, time, step, steps and reason of a run as it wrote them last; empty if there are none or damaged ones."""
    values = read_object(run / "status.json")
    try:
        return _Status.model_validate(values).model_dump() if values else {}
    except ValidationError:
        logger.warning("%s is damaged and is left out", run / "status.json")
        return {}


def read_config(run: Path) -> dict[str, Any]:
    """Return the values of a run's config; empty if there is none or a damaged one."""
    path = run / "config.yaml"
    if not path.is_file():
        return {}
    try:
        values = yaml.safe_load(path.read_bytes())
    except (yaml.YAMLError, ValueError, RecursionError):
        values = None
    if isinstance(values, dict):
        return values
    logger.warning("%s is damaged and is left out", path)
    return {}
