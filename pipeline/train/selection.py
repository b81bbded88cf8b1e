"""Which state of a run is its result: the last one, or that of the best validation (torch-free)."""

import math
from collections.abc import Mapping
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from pipeline.evaluate.chance import standard_error

Count = Annotated[int, Field(ge=0, lt=2**53)]


class Selection(BaseModel):
    """What the validations of a run have found; equal on all ranks, and saved with the loop's numbers.

    Attributes:
        step: Optimizer step of the best validation; 0 before the first.
        best: Its criteria, by name.
        last: The criteria of the newest validation whose criteria are finite.
        seen: Number of validations.
        waited: Validations since the best one.
    """

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    step: Count = 0
    best: dict[str, float] = {}
    last: dict[str, float] = {}
    seen: Count = 0
    waited: Count = 0

    def see(self, step: int, row: Mapping[str, float], criteria: Mapping[str, int], images: int = 0) -> bool:
        """Compare a validation with the best one; the first of two equal ones stays the best.

        A trained start (step 0) gives way to the first state that is not worse by as much as a standard error of its accuracy;
        from then on the best one counts. A later state has learnt more, and few images cannot tell that this has helped. That it
        has harmed they can. This is ours.

        Args:
            step: Optimizer steps so far.
            row: The validation's numbers.
            criteria: Names in `row`, most important first -> 1 if larger is better, -1 if smaller is. One of 1 is in percent.
            images: How many images were validated; 0 = a start is a state like all others.

        Returns:
            Whether it is the best so far. One that is not finite never is.
        """
        found = {name: float(row[name]) for name in criteria}
        finite = all(map(math.isfinite, found.values()))
        better = finite and (not self.best or _order(found, criteria) > self._bar(criteria, images))
        self.seen += 1
        self.waited = 0 if better else self.waited + 1
        if finite:
            self.last = found
        if better:
            self.step, self.best = step, found
        return better

    def _bar(self, criteria: Mapping[str, int], images: int) -> list[float]:
        """Return what the next best must exceed."""
        bar = _order(self.best, criteria)
        if self.step == 0 and images and next(iter(criteria.values())) == 1:
            return [bar[0] - standard_error(bar[0], images)] + [-math.inf] * (len(bar) - 1)
        return bar


def _order(found: Mapping[str, float], criteria: Mapping[str, int]) -> list[float]:
    return [sign * found[name] for name, sign in criteria.items()]
