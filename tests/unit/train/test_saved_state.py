"""The small numbers of a checkpoint: whatever stands there is refused in a sentence, or restored as it stands."""

import json
import math
import random
from typing import Any

import pytest
import torch

from pipeline.ssl.config import LyapEMAConfig, PseudoLabelRule
from pipeline.ssl.lyapema import LyapEMA
from pipeline.ssl.pseudo_labels import PseudoLabeller
from pipeline.train.saved_state import LoopRecord, SavedState, misfit
from pipeline.train.selection import Selection
from tests.fuzz import mutate

CRITERIA = ("val/top1", "val/nll")
LOOP = LoopRecord(left_out=[], rewinds=0, fingerprint=1.0)


def small_numbers() -> tuple[LyapEMA, PseudoLabeller]:
    weights = [torch.nn.Parameter(torch.ones(5))]
    ema = LyapEMA(weights, torch.optim.SGD(weights, lr=0.1), LyapEMAConfig(mode="guarded"))
    return ema, PseudoLabeller(torch.full((3,), 1 / 3), PseudoLabelRule(thresholds="class_balanced"))


def saved(task: dict[str, Any], *, step: int = 5, loop: LoopRecord = LOOP) -> SavedState:
    return SavedState(step=step, optimizer_step=5.0, task=task, loop=loop, inputs={})


def test_every_form_of_the_small_numbers_is_refused_or_restored() -> None:
    """The law of restoring: of 2,000 changed states, none ends in another error, and what is accepted is what is restored."""
    ema, labeller = small_numbers()
    own = {"teacher": ema.state_dict(), "labeller": labeller.state_dict()}
    assert misfit(saved(json.loads(json.dumps(own))), own, CRITERIA, 9) == ""
    refused = 0
    for seed in range(2000):
        rng = random.Random(seed)
        changed = mutate.tree(rng, own, rng.randrange(1, 3))
        if not isinstance(changed, dict) or not all(isinstance(name, str) for name in changed):
            continue
        problem = misfit(saved(changed), own, CRITERIA, 9)
        refused += bool(problem)
        assert len(problem) < 200
        if not problem:
            ema.load_state_dict(changed["teacher"])
            labeller.load_state_dict(changed["labeller"])
            assert {"teacher": ema.state_dict(), "labeller": labeller.state_dict()} == changed
    assert 1000 < refused < 2000


@pytest.mark.parametrize(
    ("part", "name", "value", "said"),
    [
        ("labeller", "confident", [0.25] * 4, "task.labeller.confident has 4 values in place of 3"),
        ("labeller", "confident", [0.25, [0.25], 0.5], "task.labeller.confident.1 is no float"),
        ("labeller", "confidence", [0.5], "task.labeller.confidence is no float"),
        ("labeller", "seen", [0.0, math.nan, 0.0, 0.0, 0.0], "task.labeller.seen.1 is nan"),
        ("teacher", "updates", -1, "task.teacher.updates is -1"),
        ("teacher", "updates", True, "task.teacher.updates is no int"),
        ("teacher", "updates", 10**400, "task.teacher.updates is 1000"),
        ("teacher", "more", 0.0, "task.teacher must have radius, radius_bound, mean_step, rollbacks, updates"),
    ],
)
def test_numbers_of_another_form_are_named(part: str, name: str, value: Any, said: str) -> None:
    ema, labeller = small_numbers()
    own: dict[str, Any] = {"teacher": ema.state_dict(), "labeller": labeller.state_dict()}
    assert misfit(saved(own | {part: own[part] | {name: value}}), own, CRITERIA, 9).startswith(said)
    assert misfit(saved({"teacher": own["teacher"]}), own, CRITERIA, 9) == "task must have teacher, labeller"
    assert misfit(saved(own), {}, CRITERIA, 9) == "task must have nothing"


def test_a_state_of_another_run_is_refused() -> None:
    """A step beyond the run's last, and validations that are compared by other numbers."""
    assert misfit(saved({}, step=9), {}, CRITERIA, 9) == ""
    assert misfit(saved({}, step=10), {}, CRITERIA, 9) == "it is of step 10, and the run has 9"
    found = {"val/top1": 50.0, "val/nll": 1.0}
    for best, last, fits in (
        (found, found, True),
        ({}, {}, True),
        ({}, found, True),
        (found, {}, False),
        ({"val/top1": 50.0}, found, False),
        (found, {"val/loss": 1.0}, False),
    ):
        loop = LOOP.model_copy(update={"selection": Selection(best=best, last=last)})
        assert (misfit(saved({}, loop=loop), {}, CRITERIA, 9) == "") is fits
