"""Losses that more than one stage uses. They return tensors; they neither log nor reduce over ranks.

Shapes: B images, K classes.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def distillation_loss(student: Tensor, teacher: Tensor, *, kind: str, temperature: float) -> Tensor:
    """Compute the loss that pulls a student towards its teacher, averaged over the batch.

    Args:
        student: Logits (B, K).
        teacher: Logits (B, K).
        kind: `hard`: cross-entropy with the teacher's argmax (DeiT, Touvron et al. 2021). `soft`: KL divergence at
            `temperature`, times its square (Hinton et al. 2015).
        temperature: Divides both sets of logits for `soft`; `hard` ignores it.

    Returns:
        A scalar.
    """
    if kind == "hard":
        return F.cross_entropy(student, teacher.argmax(-1))
    log_p, log_q = (F.log_softmax(x.float() / temperature, dim=-1) for x in (student, teacher))
    return F.kl_div(log_p, log_q, log_target=True, reduction="batchmean") * temperature**2


def soft_cross_entropy(logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """Compute the cross-entropy of each image with probabilities as targets.

    Args:
        logits: (B, K).
        targets: Probabilities (B, K).
        smoothing: Share of the targets that is spread evenly over all classes.

    Returns:
        (B,), in fp32.
    """
    targets = targets * (1 - smoothing) + smoothing / targets.shape[1]
    return -(targets * torch.log_softmax(logits.float(), dim=-1)).sum(-1)


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """Encode labels (B,) as (B, classes) in fp32.

    torch's own function waits for the device to check that the labels fit; this one does not.
    """
    return (labels[:, None] == torch.arange(classes, device=labels.device)).float()


def class_weights(counts: Tensor, kind: str, beta: float) -> Tensor:
    """Weigh the classes of a long tail, the rare ones more.

    Args:
        counts: (K,) labelled images of each class, n.
        kind: `inverse`: 1 / n. `effective`: (1 - beta) / (1 - beta^n), one over the effective number of samples (Cui et al.
            2019, eq. 2).
        beta: Only `effective` reads it; 0 weighs all alike, towards 1 it becomes `inverse`.

    Returns:
        (K,) in fp32, with the sum K' over the K' classes that have labels, and 0 for the others.
    """
    n = counts.double()
    # log1p and expm1 keep their digits where beta is next to 1.
    effective = -torch.expm1(n * math.log(beta)) / (1 - beta) if kind == "effective" and beta > 0 else n.clamp(max=1)
    weights = torch.where(n > 0, 1 / (n if kind == "inverse" else effective).clamp(min=1e-300), 0.0)
    return (weights * (n > 0).sum() / weights.sum()).float()


def weigh(losses: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
    """Scale the loss of each image (B,) by the weight of its class; of a mixed image, by the mean of its classes' weights.

    Args:
        losses: (B,).
        targets: Probabilities (B, K), before smoothing.
        weights: (K,) or None for no weights.
    """
    return losses if weights is None else losses * (targets @ weights)
