"""What is to be started, as values: the stages of an experiment in their order, or many experiments of a sweep. Torch-free."""

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from launchers.config import ClusterConfig
from pipeline.config import apply_overrides, choose, find_config, load_config, read_values
from pipeline.errors import ConfigError
from stages import SPECS
from stages.check import check, is_complete
from stages.configs.base import StageConfig

CHAIN = "chain"


class Step(NamedTuple):
    """One stage of one experiment. `values` is its config file with the overrides in it: what a job will read."""

    path: Path
    overrides: tuple[str, ...]
    config: StageConfig
    values: dict[str, Any]

    @property
    def stage(self) -> str:
        """The stage's name."""
        return self.config.stage

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.config.folder


def read_steps(stage: str, config: str, overrides: Sequence[str]) -> list[Step]:
    """The steps of STAGE CONFIG, or of `chain NAME`: configs/STAGE/NAME.yaml of every stage (or a NAME for each, with commas).

    `arm:optim.lr=1e-3` overrides in that stage only.
    """
    names = list(SPECS) if stage == CHAIN else [stage]
    for override in overrides:
        head = re.match(r"([a-z]+):", override)
        if head and (head[1] not in SPECS):
            raise ConfigError(
                f"override {override!r}: before the colon stands a stage ({', '.join(SPECS)}); `cluster` where jobs are meant"
            )
        if head and head[1] not in names:
            raise ConfigError(f"override {override!r} is of stage {head[1]}, which is not among {', '.join(names)}")
    files = config.split(",") if "," in config and stage == CHAIN else [config] * len(names)
    if len(files) != len(names):
        raise ConfigError(f"chain {config}: give one name for all stages, or one for each of {', '.join(names)}")
    steps = []
    for name, file in zip(names, files, strict=True):
        entry = choose("stage", name, SPECS)
        path = find_config(Path(f"configs/{name}/{file}.yaml") if stage == CHAIN else Path(file))
        own = tuple(
            o.removeprefix(f"{name}:") for o in overrides if ":" not in o.partition("=")[0] or o.startswith(f"{name}:")
        )
        loaded = load_config(entry.config, path, own)
        steps.append(Step(path, own, loaded, apply_overrides(read_values(path), own)))
    if len({step.folder.parent for step in steps}) > 1:
        places = ", ".join(f"{step.path}: {step.folder.parent}" for step in steps)
        raise ConfigError(
            f"the stages of a chain must share run.root and run.experiment ({places}); give run.experiment=NAME"
        )
    return steps


def read_points(stage: str, config: str, overrides: Sequence[str], sweep: Sequence[str]) -> list[list[Step]]:
    """The steps of every point of the grid that `sweep` spans (`optim.lr=1e-3,3e-3`, ...); of one point without any.

    A point is an experiment of its own, named after its values.
    """
    base = read_steps(stage, config, overrides)
    if not sweep:
        return [base]
    axes = [[(axis.partition("=")[0], value) for value in axis.partition("=")[2].split(",")] for axis in sweep]
    points = []
    for chosen in itertools.product(*axes):
        if any(not value for _, value in chosen):
            raise ConfigError(f"sweep {', '.join(sweep)}: expected key=value,value, for example optim.lr=1e-3,3e-3")
        name = "-".join(f"{_short(key)}_{value}" for key, value in chosen)
        name = re.sub(r"[^A-Za-z0-9_.-]+", "_", f"{base[0].config.run.experiment}-{name}")
        values = [f"{key}={value}" for key, value in chosen]
        points.append(read_steps(stage, config, [*overrides, *values, f"run.experiment={name}"]))
    if len({point[0].folder for point in points}) < len(points):
        raise ConfigError(f"sweep {', '.join(sweep)}: two points would have the same name; give each value once")
    return points


def _short(key: str) -> str:
    """`optim.lr` -> `lr`; `arm:optim.lr` -> `arm.lr`, for two stages' values of one key are two sweeps."""
    stage, colon, rest = key.rpartition(":")
    return f"{stage}{'.' if colon else ''}{rest.rpartition('.')[2]}"


def read_cluster(path: Path, overrides: Sequence[str]) -> tuple[ClusterConfig, list[str]]:
    """The preset with its `cluster:key=value` overrides, and the overrides that are left for the stages."""
    own = [o.removeprefix("cluster:") for o in overrides if o.startswith("cluster:")]
    return load_config(ClusterConfig, path, own), [o for o in overrides if not o.startswith("cluster:")]


def open_steps(steps: Sequence[Step], world_size: int) -> list[Step]:
    """Those that are not complete yet, each checked as far as it can be before its parents are there."""
    todo = [step for step in steps if not is_complete(step.config)]
    pending = {step.folder / "export": step.config for step in todo}
    for step in todo:
        check(step.config, world_size, pending)
    return todo
