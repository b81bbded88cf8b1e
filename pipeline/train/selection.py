"""Which state of a run is its result: the last one, or that of the best validation (torch-free)."""

import math
from collections.abc import Mapping
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

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

    def see(self, step: int, row: Mapping[str, float], criteria: Mapping[str, int]) -> bool:
        """Compare a validation with the best one; the first of two equal ones stays the best.

        A trained start (step 0) gives way to the first state whose first criterion is as good, whatever the others are: a
        later state has learnt more, and few images often cannot tell that this has helped. Where all later states are worse,
        though the best of many is compared, it has harmed. This is ours; docs/recipe.md has what it was found on.

        Args:
            step: Optimizer steps so far.
            row: The validation's numbers.
            criteria: Names in `row`, most important first -> 1 if larger is better, -1 if smaller is.

        Returns:
            Whether it is the best so far. One that is not finite never is.
        """
        found = {name: float(row[name]) for name in criteria}
        finite = all(map(math.isfinite, found.values()))
        better = finite and (not self.best or self._is_beaten_by(found, criteria))
        self.seen += 1
        self.waited = 0 if better else self.waited + 1
        if finite:
            self.last = found
        if better:
            self.step, self.best = step, found
        return better

    def _is_beaten_by(self, found: Mapping[str, float], criteria: Mapping[str, int]) -> bool:
        new, best = _order(found, criteria), _order(self.best, criteria)
        return new[0] >= best[0] if self.step == 0 else new > best


def _order(found: Mapping[str, float], criteria: Mapping[str, int]) -> list[float]:
    return [sign * found[name] for name, sign in criteria.items()]
