"""ABC, the auxiliary balanced classifier (Lee, Shin, Kim 2021): a second head that learns from balanced masks.

Shapes: B images, C classes.
"""

import math

import torch
from torch import Tensor

from pipeline.models.losses import one_hot, soft_cross_entropy
from pipeline.ssl.config import BalancedHeadConfig


class BalancedHeadLoss:
    """The two losses of the balanced head; its gradients reach the backbone too.

    Labels: a label of class c is kept with probability N_rarest / N_c. Consistency: where the head's own prediction of the
    weak view has a confidence of `threshold` or more, the strong view learns it; it is kept with a probability that falls
    from 1 to N_rarest / N_c over the training. Both are means over the batch.
    Deviations: the paper has two strong views, this one; a class without labels counts as the rarest with labels.

    Args:
        prior: (C,) the classes' shares of the labelled samples.
        config: The head's settings.
    """

    def __init__(self, prior: Tensor, config: BalancedHeadConfig) -> None:
        rarest = prior.masked_fill(prior == 0, math.inf).min()
        self.keep = (rarest / prior.clamp(min=rarest)).float()
        self.config = config

    def labelled(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the loss on labels, a scalar.

        Args:
            logits: (B, C) of the balanced head.
            targets: (B, C) probabilities; one-hot, or mixed labels, whose probability to be kept is mixed alike.
        """
        kept = torch.bernoulli(targets @ self.keep)
        return (soft_cross_entropy(logits, targets) * kept).mean()

    def consistency(self, weak: Tensor, strong: Tensor, progress: float) -> Tensor:
        """Return the loss on unlabelled images, a scalar.

        Args:
            weak: (B, C) logits of the balanced head for the weak views, without a gradient.
            strong: (B, C) for the strong views.
            progress: Share of the training that has passed, 0 to 1.
        """
        probabilities = weak.float().softmax(-1)
        confidence, guesses = probabilities.max(-1)
        kept = torch.bernoulli(1 - progress * (1 - self.keep[guesses])) * (confidence >= self.config.threshold)
        targets = probabilities if self.config.targets == "soft" else one_hot(guesses, weak.shape[1])
        return (soft_cross_entropy(strong, targets) * kept).mean()
