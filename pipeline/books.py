"""Small files of a run's folder that people and other commands read, as schemas (torch-free).

A kill, a full disk or a person may have damaged them. Then they count as absent, with a warning, so no report or status
ends in it. A schema names what its readers use, and lets the rest pass.
"""

import logging
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.errors import ConfigError
from pipeline.jsonl import read_object
from pipeline.yaml_text import parse_yaml

logger = logging.getLogger(__name__)

Number = Annotated[float, Field(ge=-1e15, le=1e15)]
Percent = Annotated[float, Field(ge=-0.01, le=100.01)]
Count = Annotated[int, Field(ge=0, lt=2**53)]
Names = dict[str, list[str]]


class _Book(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class _Bin(_Book):
    samples: Count
    confidence: Number
    accuracy: Number


class Scores(_Book):
    """The metrics of one model; a group without classes has none."""

    top1: Percent
    top5: Percent | None = None
    balanced: Percent | None = None
    head: Percent | None = None
    medium: Percent | None = None
    tail: Percent | None = None
    ece: Percent
    nll: Number | None = None
    samples: Count
    intervals: dict[str, Annotated[list[Number], Field(min_length=2, max_length=2)]] = {}
    groups: Names = {}
    per_class: dict[str, Percent | None]
    reliability: list[_Bin] = []
    confusion: list[list[Count]]

    @model_validator(mode="after")
    def _fits(self) -> Self:
        classes = len(self.per_class)
        if {len(self.confusion), *map(len, self.confusion)} - {classes}:
            raise ValueError("the confusion matrix has another number of classes")
        if any(set(members) - set(self.per_class) for members in self.groups.values()):
            raise ValueError("a group has a class that is not evaluated")
        return self


class Labels(_Book):
    """How many labels were used for what."""

    labelled: Count = 0
    validation: Count = 0
    hidden: Count = 0
    without_label: Count = 0


class Evaluation(_Book):
    """`evaluation.json`: what a stage has measured at its end."""

    dataset: str = ""
    split: str | None = None
    protocol: str = ""
    evaluated_on: str = ""
    labels: Labels = Labels()
    labels_in_words: str = ""
    labelled_per_class: dict[str, Count] = {}
    models: dict[str, Scores] = {}


class _Finding(_Book):
    name: str
    level: str
    title: str
    text: str
    count: Count = 0


class DataFindings(_Book):
    """`data-check.json`: what the check of a chain's data found."""

    findings: list[_Finding] = []


class _Planned(_Book):
    stage: str
    config_sha256: str | None = None


class Plan(_Book):
    """`plan.json`: what a chain was expected to need."""

    stages: list[_Planned] = []


class _Data(_Book):
    train: str | list[str]
    split: str | None = None
    validation: str | None = None
    test: str | None = None
    classes: str | None = None
    ground: Annotated[list[Annotated[int, Field(ge=0, le=255)]], Field(min_length=3, max_length=3)] = [255] * 3
    max_pixels: Annotated[int, Field(gt=0)] = 1


class Submission(_Book):
    """`slurm/STAGE.json`: the job that was last submitted for a stage, and the one that it waits for."""

    job: Annotated[str, Field(pattern=r"^\d{1,20}(_\d{1,10})?$")]
    logs: str
    after: str = ""
    cluster: dict[str, Any] = {}


class _Seed(_Book):
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0


class _Pseudo(_Book):
    threshold: Number | None = None


class RunConfig(_Book):
    """`config.yaml`, as far as commands read it that know no stage."""

    run: _Seed = _Seed()
    data: _Data | None = None
    pseudo: _Pseudo = _Pseudo()
    export: str = ""


class TrackerNote(_Book):
    """`tracker.json`: the run of a tracker, which its library may make a file of, and what was sent to it."""

    tracker: str
    id: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}$")
    sent: dict[str, Count]


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


def read_book(path: Path, schema: type[BaseModel]) -> dict[str, Any]:
    """Return the values of a JSON file that fits a schema; empty if there is none, and with a warning if it is damaged."""
    return _checked(path, read_object(path), schema) if path.is_file() else {}


def read_config(run: Path) -> dict[str, Any]:
    """Return the values of a run's config; empty if there is none or a damaged one."""
    path = run / "config.yaml"
    values = read_values(path)
    if values is None and path.is_file():
        logger.warning("%s is damaged and is left out", path)
    return _checked(path, values or {}, RunConfig)


def read_values(path: Path) -> dict[str, Any] | None:
    """Return the nested values of a config that a run has written; None if there is none or a damaged one."""
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"), str(path)) if path.is_file() else None
    except (ConfigError, OSError, ValueError):
        values = None
    return values if isinstance(values, dict) else None


def _checked(path: Path, values: dict[str, Any], schema: type[BaseModel]) -> dict[str, Any]:
    try:
        schema.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))[:80]
        logger.warning("%s is damaged and is left out (%s: %s)", path, where, first["msg"])
        return {}
    return values
