"""The trials of a sweep in Optuna's journal, a file that only grows. This is the only file that knows Optuna.

The sampler of trial n is seeded by the sweep's seed and n. So a sweep that was killed and continues asks for the same trials as
one that ran through, as long as its trials run one after another.
"""

import itertools
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from launchers.sweep.space import Axis, Sampler
from pipeline.errors import EnvironmentProblem

State = Literal["open", "complete", "failed"]


class Trial(NamedTuple):
    """One trial.

    Attributes:
        number: From 0, in the order of asking.
        values: Key -> value, as it is written in an override.
        state: open: asked for, and nothing is told of it yet.
        score: What its best validation reached, if it is complete.
    """

    number: int
    values: Mapping[str, str]
    state: State
    score: float | None

    @property
    def overrides(self) -> list[str]:
        """The values as overrides."""
        return [f"{key}={value}" for key, value in self.values.items()]


class Study:
    """A sweep's trials.

    Args:
        journal: The file, which is made if it is not there.
        axes: What is searched.
        sampler: How the next values are found.
        seed: Of the sampler.
        minimise: Whether smaller scores are better.

    Raises:
        EnvironmentProblem: Optuna is not installed.
    """

    def __init__(self, journal: Path, axes: Sequence[Axis], *, sampler: Sampler, seed: int, minimise: bool) -> None:
        self._optuna = optuna = _optuna()
        self._axes, self._sampler, self._seed, self._minimise = axes, sampler, seed, minimise
        storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(journal)))
        self._study = optuna.create_study(
            storage=storage, study_name="sweep", direction="minimize" if minimise else "maximize", load_if_exists=True
        )

    def trials(self) -> list[Trial]:
        """Return all trials in the order of asking; one that a kill left without all of its values has failed."""
        waiting = self._optuna.trial.TrialState.WAITING
        return [self._read(found) for found in self._study.get_trials(deepcopy=False) if found.state != waiting]

    def ask(self) -> Trial | None:
        """Open a new trial; None if a grid has no further point."""
        number = len(self.trials())
        if self._sampler == "grid":
            points = list(itertools.product(*(axis.choices for axis in self._axes)))
            if number >= len(points):
                return None
            if number == len(self._study.get_trials(deepcopy=False)):  # else a kill has left it waiting
                self._study.enqueue_trial(dict(zip((axis.key for axis in self._axes), points[number], strict=True)))
        else:
            samplers = self._optuna.samplers
            made = {"tpe": samplers.TPESampler, "random": samplers.RandomSampler}[self._sampler]
            self._study.sampler = made(seed=self._seed + number)
        asked = self._study.ask({axis.key: self._distribution(axis) for axis in self._axes})
        return self.trials()[asked.number]

    def tell(self, number: int, score: float | None) -> None:
        """Close a trial: with its score, or with None if it failed."""
        states = self._optuna.trial.TrialState
        self._study.tell(number, score, state=states.FAIL if score is None else states.COMPLETE)

    def best(self) -> Trial | None:
        """Return the complete trial with the best score, the first of equal ones."""
        return next((trial for trial in self.ranked() if trial.score is not None), None)

    def ranked(self) -> list[Trial]:
        """Return all trials, the best first and those without a score last."""
        sign = 1 if self._minimise else -1
        return sorted(self.trials(), key=lambda t: (t.score is None, sign * (t.score or 0.0), t.number))

    def _read(self, found: Any) -> Trial:
        states = self._optuna.trial.TrialState
        whole = len(found.params) == len(self._axes)
        state: State = "complete" if found.state == states.COMPLETE else "open"
        if found.state == states.FAIL or not whole:
            state = "failed"
        values = {key: value if isinstance(value, str) else repr(value) for key, value in found.params.items()}
        return Trial(found.number, values, state, found.value if state == "complete" else None)

    def _distribution(self, axis: Axis) -> Any:
        kinds = self._optuna.distributions
        if axis.choices:
            return kinds.CategoricalDistribution(axis.choices)
        kind = kinds.IntDistribution if axis.whole else kinds.FloatDistribution
        return kind(axis.low, axis.high, log=axis.log)


def _optuna() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # The import warns of experimental parts and of its dependencies.
            import optuna
            import optuna.storages.journal
    except ImportError:
        raise EnvironmentProblem(
            "a sweep needs Optuna, which is not installed; type: pip install 'visionmamba-pipeline[sweep]'"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
