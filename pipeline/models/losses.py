"""Losses that more than one stage uses. They return tensors; they neither log nor reduce over ranks.

Shapes: B images, K classes.
"""

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
