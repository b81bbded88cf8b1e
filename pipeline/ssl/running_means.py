"""Running means of what the labelling network predicts: the state that adaptive pseudo-labels follow.

The means are taken over all ranks' images of the previous steps. `watch` adds to the sums of this step, `update` is called
once per step. So they depend neither on the world size nor on how a batch is cut into micro-batches.
Shapes: B images, C classes.
"""

from typing import Any

import torch
from torch import Tensor

from pipeline.train.distributed import sum_over_ranks

# Without a momentum the means weigh their first HORIZON steps equally; later they forget with this horizon.
HORIZON = 100


class RunningMeans:
    """Five means over the steps, in float64. Before the first step they have the values that the papers start from.

    Args:
        classes: C.
        device: Where the predictions are.
        momentum: Share of a mean that remains after a step (m or lambda in the papers); None for equal weights of the first
            HORIZON steps.

    Attributes:
        probability: (C,) the mean prediction. It starts uniform.
        confident: (C,) the classes' shares among the confident predictions. It starts uniform.
        predicted: (C,) the classes' shares among all predictions. It starts uniform.
        confidence: () the mean confidence. It starts at 1 / C.
        variance: () the variance of the confidence within a step, without bias. It starts at 1.
    """

    NAMES = ("probability", "confident", "predicted", "confidence", "variance")

    def __init__(self, classes: int, device: torch.device, momentum: float | None) -> None:
        self.momentum = momentum
        uniform = torch.full((classes,), 1 / classes, dtype=torch.float64, device=device)
        self.probability, self.confident, self.predicted = uniform.clone(), uniform.clone(), uniform.clone()
        self.confidence, self.variance = uniform[0].clone(), torch.ones_like(uniform[0])
        self._seen = torch.zeros(len(self.NAMES), dtype=torch.float64, device=device)  # steps in each of the means
        # One tensor, so that a step has one all-reduce: three rows of classes, then n, the sum and the sum of squares.
        self._sums = torch.zeros(3 * classes + 3, dtype=torch.float64, device=device)
        self._shares, self._moments = self._sums[:-3].view(3, classes), self._sums[-3:]

    def watch(self, probabilities: Tensor, labels: Tensor, confidence: Tensor, confident: Tensor) -> None:
        """Add a micro-batch to the sums of this step.

        Args:
            probabilities: (B, C) the predictions.
            labels: (B,) the pseudo-labels.
            confidence: (B,) their confidence.
            confident: (B,) which of them count for `confident`.
        """
        self._shares[0] += probabilities.double().sum(0)
        self._shares[1].index_add_(0, labels, confident.double())
        self._shares[2].index_add_(0, labels, torch.ones_like(labels, dtype=torch.float64))
        sure = confidence.double()
        self._moments += torch.stack([torch.ones_like(sure).sum(), sure.sum(), sure.square().sum()])

    def update(self) -> None:
        """Let the means see this step (collective)."""
        sum_over_ranks(self._sums)
        totals = self._shares.sum(1)
        number, total, squares = self._moments.unbind()
        mean = total / number.clamp(min=1)
        variance = ((squares - number * mean.square()) / (number - 1).clamp(min=1)).clamp(min=0)
        # A step without a confident prediction says nothing about their classes and is not counted; otherwise the uniform
        # start would outlast the first predictions. There is no branch, since it would wait for a GPU.
        told = torch.stack([*totals, number, number]).sign()
        self._seen += told
        if self.momentum is None:
            weights = told / self._seen.clamp(min=1, max=HORIZON)
        else:
            weights = told * (1 - self.momentum)
        found = (*(self._shares / totals.clamp(min=1e-30)[:, None]), mean, variance)
        for name, value, weight in zip(self.NAMES, found, weights, strict=True):
            getattr(self, name).lerp_(value, weight)
        self._sums.zero_()

    def state_dict(self) -> dict[str, Any]:
        """Return the means and how many steps they have seen, equal on all ranks."""
        return {name: getattr(self, name).tolist() for name in self.NAMES} | {"seen": self._seen.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        for name in self.NAMES:
            getattr(self, name).copy_(torch.tensor(state[name], dtype=torch.float64))
        self._seen.copy_(torch.tensor(state["seen"], dtype=torch.float64))
        self._sums.zero_()
