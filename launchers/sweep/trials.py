"""What one trial of a sweep runs, and what it reached (torch-free)."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from launchers.chain import CHAIN, Step, read_steps
from launchers.sweep.space import Axis, Sampler
from launchers.sweep.study import Trial
from pipeline.errors import ConfigError
from pipeline.exports.card import Card
from stages import spec_of


@dataclass(frozen=True, kw_only=True)
class Order:
    """A sweep, as it was typed.

    Attributes:
        stage: A stage, or `chain`.
        config: A file, or for the chain a name.
        overrides: Those of every trial.
        axes: What is searched.
        trials: The number of trials.
        sampler: How the next values are found.
        seed: Of the sampler.
        jobs: Trials at the same time.
        nproc: Processes of each stage.
    """

    stage: str
    config: str
    overrides: Sequence[str]
    axes: Sequence[Axis]
    trials: int
    sampler: Sampler = "tpe"
    seed: int = 0
    jobs: int = 1
    nproc: int = 1

    @functools.cached_property
    def base(self) -> list[Step]:
        """The steps without a trial's values, as the files are when the sweep starts."""
        return read_steps(self.stage, self.config, self.overrides)

    @property
    def folder(self) -> Path:
        """Where the sweep keeps its journal, logs and table, beside the folders of its trials."""
        experiment = self.base[0].folder.parent
        return experiment.with_name(f"{experiment.name}-sweep")


class Score(NamedTuple):
    """The number that a trial is compared by."""

    name: str
    value: float


def words_of(order: Order, number: int, values: Sequence[str]) -> list[str]:
    """Return all overrides of one trial, as they follow `python -m launchers local STAGE CONFIG`.

    A trial of one stage starts from the parents of the experiment that the config names, which it does not train again. It has
    no test set, and exports its best validation.

    Args:
        order: The sweep.
        number: Of the trial.
        values: Its values, as overrides.
    """
    base = order.base
    last = base[-1].config
    fixed = [f"run.experiment={order.folder.name}-{number:03d}", "data.test=null"]
    if order.stage == CHAIN:
        return [*order.overrides, *values, *fixed, f"{last.stage}:loop.select=best"]
    spec = spec_of(last)
    parents = zip(spec.references(last), spec.parents(last).values(), strict=True)
    return [*order.overrides, *(f"{key}={folder}" for key, folder in parents), *values, *fixed, "loop.select=best"]


def steps_of(order: Order, trial: Trial) -> list[Step]:
    """Return the steps of a trial.

    Raises:
        ConfigError: Its values do not go together.
    """
    return read_steps(order.stage, order.config, words_of(order, trial.number, trial.overrides))


def check_axes(order: Order) -> None:
    """Refuse a key that does not exist, a value that no run could have, and keys that a sweep sets itself.

    Raises:
        ConfigError: Names the first problem.
    """
    for axis in order.axes:
        if axis.key.rpartition(":")[2] in ("run.experiment", "run.root", "data.test", "loop.select"):
            raise ConfigError(f"--over {axis.key}: a sweep sets this key itself; leave it out")
        for value in axis.ends():
            read_steps(order.stage, order.config, words_of(order, 0, [f"{axis.key}={value}"]))
    if order.sampler == "grid" and (ranges := [axis.key for axis in order.axes if not axis.choices]):
        raise ConfigError(
            f"--sampler grid needs lists of values, but {ranges[0]} is a range; list its values with commas"
        )


def score_of(steps: Sequence[Step]) -> Score:
    """Return the best validation of a complete trial.

    Raises:
        HandoverError: Its export is damaged.
        ConfigError: It was never validated.
    """
    card = Card.read(steps[-1].folder / "export")
    best = card.selected.best if card.selected else {}
    if not best:
        raise ConfigError(f"{steps[-1].folder} has no validation to be compared by; set loop.eval_every")
    return Score(*next(iter(best.items())))
