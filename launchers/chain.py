"""What a command is to start, as values (torch-free): one stage, the stages of a chain, or the points of a sweep."""

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from launchers.config import ClusterConfig
from pipeline.config import apply_overrides, choose, find_config, load_config, read_values
from pipeline.errors import ConfigError
from stages import SPECS
from stages.check import check, is_complete, written_by
from stages.configs.base import StageConfig

CHAIN = "chain"  # in place of a stage's name: all stages


class Step(NamedTuple):
    """One stage of one experiment.

    Attributes:
        path: The config file.
        overrides: The overrides that hold for this stage.
        config: Both, validated.
        values: Both, as plain values; a job of SLURM reads a file of them.
    """

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
    """Read the configs of one stage or of the whole chain.

    Args:
        stage: The stage's name, or `chain`.
        config: The config file; for the chain a NAME (configs/STAGE/NAME.yaml of every stage), or one for each, with commas. A
            chain of one NAME begins with the first stage that has such a file.
        overrides: Words such as `optim.lr=1e-3`; `arm:optim.lr=1e-3` holds in that stage only.

    Raises:
        ConfigError: A file, a key or a value is wrong, or the stages do not share an experiment.
    """
    names = _chain_stages(config) if stage == CHAIN else [stage]
    for override in overrides:
        head = re.match(r"([a-z]+):", override)
        if head and (head[1] not in SPECS):
            raise ConfigError(
                f"override {override!r}: {head[1]!r} before the colon is no stage; give one of {', '.join(SPECS)}, or cluster"
                " for the preset of slurm, plan and doctor"
            )
        if head and head[1] not in names:
            raise ConfigError(
                f"override {override!r} is for stage {head[1]}, but only {', '.join(names)} is started; remove the override"
            )
    files = config.split(",") if "," in config and stage == CHAIN else [config] * len(names)
    if len(files) != len(names):
        raise ConfigError(
            f"chain {config}: there are {len(files)} names; give one for all stages, or one for each of {', '.join(names)}"
        )
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


def _chain_stages(config: str) -> list[str]:
    """Return all stages, without those before the first one that has a config file of the chain's NAME."""
    names = list(SPECS)
    first = next((k for k, name in enumerate(names) if find_config(Path(f"configs/{name}/{config}.yaml")).is_file()), 0)
    return names[first:]


def read_points(stage: str, config: str, overrides: Sequence[str], sweep: Sequence[str]) -> list[list[Step]]:
    """Read the steps of every point of a sweep.

    Args:
        stage: As in `read_steps`.
        config: As in `read_steps`.
        overrides: As in `read_steps`.
        sweep: The axes of a grid, such as `optim.lr=1e-3,3e-3`. Each point is an experiment named after its values.

    Returns:
        The steps of each point; of one point without a sweep.
    """
    base = read_steps(stage, config, overrides)
    if not sweep:
        return [base]
    axes = [[(axis.partition("=")[0], value) for value in axis.partition("=")[2].split(",")] for axis in sweep]
    points = []
    for chosen in itertools.product(*axes):
        if any(not value for _, value in chosen):
            raise ConfigError(f"--sweep {', '.join(sweep)}: expected key=value,value, for example optim.lr=1e-3,3e-3")
        name = "-".join(f"{_short(key)}_{value}" for key, value in chosen)
        name = re.sub(r"[^A-Za-z0-9_.-]+", "_", f"{base[0].config.run.experiment}-{name}")
        values = [f"{key}={value}" for key, value in chosen]
        points.append(read_steps(stage, config, [*overrides, *values, f"run.experiment={name}"]))
    if len({point[0].folder for point in points}) < len(points):
        raise ConfigError(f"--sweep {', '.join(sweep)}: two points would have the same name; give each value once")
    return points


def _short(key: str) -> str:
    """Shorten `optim.lr` to `lr`, and `arm:optim.lr` to `arm.lr`: one key of two stages makes two different sweeps."""
    stage, colon, rest = key.rpartition(":")
    return f"{stage}{'.' if colon else ''}{rest.rpartition('.')[2]}"


def read_cluster(path: Path, overrides: Sequence[str]) -> tuple[ClusterConfig, list[str]]:
    """Read a cluster's preset.

    Args:
        path: The preset's file.
        overrides: Those of the form `cluster:key=value` hold for the preset.

    Returns:
        The preset, and the overrides that are left for the stages.
    """
    own = [o.removeprefix("cluster:") for o in overrides if o.startswith("cluster:")]
    return load_config(ClusterConfig, path, own), [o for o in overrides if not o.startswith("cluster:")]


def open_steps(steps: Sequence[Step], world_size: int) -> list[Step]:
    """Select the steps that are not complete, and check each as far as possible before its parents exist.

    Raises:
        PipelineError: What a stage would end in.
    """
    todo = [step for step in steps if not is_complete(step.config)]
    pending: dict[Path, StageConfig] = {}
    for step in todo:
        pending |= written_by(step.config)
    for step in todo:
        check(step.config, world_size, pending)
    return todo
