"""SSMixup as the released code of Semi-ViM has it: an additional loss on mixed images, at the level of logits.

Every strong view is mixed with its partner in pixel space, x' = psi x + (1 - psi) x_partner. So are the one-hot pseudo-labels.
The student sees x' ("forward") and its mirror image ("backward"), which gives the logits f and b. With z = f - b,

    logits = SiLU(z) f + SiLU(z) b + nu (psi f + (1 - psi) b).

The loss is their cross-entropy, a mean over the pairs whose labels are both accepted. No state of a scan is read, so it works
with every model. The README's equation is another one: `pipeline/models/vision_mamba/ssmixup.py`.

Deviations: the released code takes features for the last term, whose width does not fit the logits of its own Vision Mamba; we
take the logits, as it does for its other models. It pairs by a random permutation of a process's batch, we inside a virtual
reader. Shapes: B images, C classes.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.ssl.pseudo_labels import PseudoLabels
from pipeline.streaming.mixup import mix


class MirroredPairs(NamedTuple):
    """Mixed images that the student sees twice, as they are and mirrored.

    Args:
        images: (B, 3, H, W) mixed strong views.
        targets: (B, C) mixed pseudo-labels.
        accepted: (B,) 1 where both labels of a pair are accepted.
        psi: (B,) share of each image's own.
        nu: Strength of the last term.
    """

    images: Tensor
    targets: Tensor
    accepted: Tensor
    psi: Tensor
    nu: float

    def loss(self, forward: Tensor, backward: Tensor) -> Tensor:
        """Return the scalar loss of the logits (B, C) of the images and of their mirror images; 0 without a pair."""
        blended = blend_logits(forward, backward, self.psi, self.nu)
        each = -(self.targets * blended.log_softmax(-1)).sum(-1)
        return (each * self.accepted).sum() / self.accepted.sum().clamp(min=1.0)


def mirrored_pairs(strong: Tensor, pseudo: PseudoLabels, partner: Tensor, psi: Tensor, nu: float) -> MirroredPairs:
    """Mix strong views (B, 3, H, W) and their pseudo-labels with those of their partners (B,)."""
    images, targets, _ = mix(strong, pseudo.targets, partner, psi, torch.zeros_like(psi, dtype=torch.bool))
    return MirroredPairs(images, targets, pseudo.accepted * pseudo.accepted[partner], psi, nu)


def blend_logits(forward: Tensor, backward: Tensor, psi: Tensor, nu: float) -> Tensor:
    """Return SiLU(z) f + SiLU(z) b + nu (psi f + (1 - psi) b) with z = f - b, all (B, C)."""
    psi = psi.detach()[:, None]
    return F.silu(forward - backward) * (forward + backward) + nu * (psi * forward + (1 - psi) * backward)
