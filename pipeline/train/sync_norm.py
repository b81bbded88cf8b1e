"""Batch norms with the statistics of the whole micro-batch, over all ranks, on a CPU as on a GPU.

On a GPU they are torch's SyncBatchNorm, which refuses CPU tensors; elsewhere they are those of this file. Without them each
rank would train with its own statistics, and the export would keep those of rank 0.
"""

import logging
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pipeline.train.distributed import sum_over_ranks

logger = logging.getLogger(__name__)


class _OverRanks(torch.autograd.Function):
    """A batch norm of (B, C, ...) with the statistics of all ranks: one sum over the ranks in each direction."""

    @staticmethod
    def forward(
        context: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the result, and per channel the mean, the variance and how many values they are of."""
        over, shape = _around_channels(x)
        number = x.numel() // x.shape[1]
        rank, of_each = dist.get_rank(), 1 / max(1, number)
        own_mean = x.sum(over) * of_each
        normal = x - own_mean.view(shape)
        rest = normal.sum(over) * of_each  # what rounding left out of the mean
        # Sums of squares around each rank's own mean, so that nothing cancels (Chan, Golub and LeVeque 1983, eq. 2.1).
        # Each rank fills its row of a table of zeros, whose sum is the whole table.
        table = x.new_zeros(dist.get_world_size(), 4, x.shape[1])
        table[rank] = torch.stack([torch.full_like(own_mean, number), own_mean, rest, normal.square().sum(over)])
        sum_over_ranks(table)
        numbers, means, rests, squares = table.unbind(1)
        count = numbers.sum(0)
        # Means as small differences from rank 0's, which fp32 holds exactly also where they are far from zero.
        apart = means - means[0]
        offset = (numbers * (apart + rests)).sum(0) / count
        away = offset - apart  # the mean of all, from each rank's own
        mean = means[0] + offset
        variance = (squares + numbers * away * (away - 2 * rests)).sum(0) / count
        scale = torch.rsqrt(variance + eps)
        normal.mul_(scale.view(shape)).sub_((away[rank] * scale).view(shape))
        context.save_for_backward(normal, weight, scale, count)
        context.mark_non_differentiable(mean, variance, count)
        y = normal.clone() if weight is None else normal * weight.view(shape)
        return y if bias is None else y.add_(bias.view(shape)), mean, variance, count

    @staticmethod
    @once_differentiable
    def backward(context: Any, g: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        """Return the gradients; those of the weight and the bias are this rank's share."""
        normal, weight, scale, count = context.saved_tensors
        over, shape = _around_channels(g)
        own = torch.stack([g.sum(over), (g * normal).sum(over)])
        of_all = own.clone()
        sum_over_ranks(of_all)
        if weight is not None:
            scale = scale * weight
        of_g, of_normal = -of_all * scale / count
        # In single steps: torch's addcmul with values per channel takes three times as long as they do.
        g_x = torch.mul(g, scale.view(shape)).add_(normal * of_normal.view(shape)).add_(of_g.view(shape))
        g_bias, g_weight = own.unbind()
        _, of_weight, of_bias, _ = context.needs_input_grad
        return g_x, g_weight if of_weight else None, g_bias if of_bias else None, None


def _around_channels(x: Tensor) -> tuple[list[int], list[int]]:
    """Return the dimensions of (B, C, ...) but for the channels, and the shape that a value per channel takes there."""
    return [i for i in range(x.dim()) if i != 1], [1, -1] + [1] * (x.dim() - 2)


class _Synchronised(nn.modules.batchnorm._BatchNorm):
    """A batch norm of all ranks' images."""

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of dimensions is fine."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (B, C, ...) per channel."""
        if not self.training or not dist.is_initialized() or dist.get_world_size() == 1:
            return super().forward(input)
        weight, bias = (None if t is None else t.float() for t in (self.weight, self.bias))
        y, mean, variance, count = _OverRanks.apply(input.float(), weight, bias, self.eps)
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            with torch.no_grad():
                self.num_batches_tracked += 1
                share: Any = self.momentum
                if share is None:  # stays on the device, since reading it would wait
                    share = self.num_batches_tracked.to(self.running_mean.dtype).reciprocal()
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
                unbiased = variance * count / (count - 1)
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), share)
        return y.to(input.dtype)


def synchronise_batch_norms(model: nn.Module, device: torch.device) -> None:
    """Let every batch norm of `model` see all ranks, in place; names, parameters and buffers do not change.

    Args:
        model: The network.
        device: Where it will train.
    """
    for name, module in model.named_modules():
        if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d):
            module.__class__ = nn.SyncBatchNorm if device.type == "cuda" else _Synchronised
            module.process_group = None  # all ranks
        elif isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(
            module, (_Synchronised, nn.SyncBatchNorm)
        ):
            logger.warning("%s (%s) keeps separate statistics on each rank", name, type(module).__name__)
