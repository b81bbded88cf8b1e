"""Losses that more than one stage may use. They return tensors; they neither log nor reduce over ranks."""

import torch
import torch.nn.functional as F
from torch import Tensor


def distillation_loss(student: Tensor, teacher: Tensor, *, kind: str, temperature: float) -> Tensor:
    """Logits (B, C) of both -> scalar. `hard`: cross-entropy with the teacher's argmax (DeiT). `soft`: KL at `temperature`,
    times its square (Hinton et al. 2015)."""
    if kind == "hard":
        return F.cross_entropy(student, teacher.argmax(-1))
    log_p, log_q = (F.log_softmax(x.float() / temperature, dim=-1) for x in (student, teacher))
    return F.kl_div(log_p, log_q, log_target=True, reduction="batchmean") * temperature**2


def soft_cross_entropy(logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """(B,) cross-entropy with probabilities (B, C), of which `smoothing` is spread over all classes."""
    targets = targets * (1 - smoothing) + smoothing / targets.shape[1]
    return -(targets * torch.log_softmax(logits.float(), dim=-1)).sum(-1)


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """(B,) -> (B, classes), fp32. Unlike torch's it does not read the labels back to see whether they fit."""
    return (labels[:, None] == torch.arange(classes, device=labels.device)).float()
