"""Choose on the validation images what to use: the model that the chain exports, an earlier stage, or a simple learner.

The chain's export is recommended unless another candidate is better by more than one standard error of the difference; then
the best of those is. That is the rule of one standard error (Breiman et al. 1984), with the chain's export in the place of the
simplest model: validation images are few, and the best of several candidates on few images is often the best by luck. Test
images have no part in it.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

LEAST, MOST = 0.05, 0.95  # accuracies that a standard error is computed with; at 0 and 1 it would be 0


class Candidate(NamedTuple):
    """Something that can be used.

    Attributes:
        title: What it is.
        validated: Its accuracy on the validation images in percent, a mean over the classes.
    """

    title: str
    validated: float


def recommend(candidates: Sequence[Candidate], images: int) -> Candidate:
    """Choose among candidates.

    Args:
        candidates: The chain's export first.
        images: Number of validation images.
    """
    first = candidates[0]
    better = [c for c in candidates[1:] if c.validated - first.validated > standard_error(c, first, images)]
    return max(better, key=lambda c: c.validated, default=first)


def standard_error(a: Candidate, b: Candidate, images: int) -> float:
    """Return the standard error of the difference of two accuracies, in points, as if their images were others."""
    shares = [min(max(c.validated / 100, LEAST), MOST) for c in (a, b)]
    return 100 * math.sqrt(sum(share * (1 - share) for share in shares) / max(1, images))
