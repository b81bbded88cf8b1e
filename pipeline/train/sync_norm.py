"""Batch norms with the statistics of the whole micro-batch, over all ranks, on a CPU as on a GPU.

On a GPU they are torch's SyncBatchNorm, which refuses CPU tensors; elsewhere they are those of this file. Without them each
rank would train with its own statistics, and the export would keep those of rank 0.
"""

import logging
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

logger = logging.getLogger(__name__)


class SumOverRanks(torch.autograd.Function):
    """The sum of a tensor over all ranks; its gradient is the sum of their gradients."""

    @staticmethod
    def forward(context: Any, value: Tensor) -> Tensor:
        """Sum a tensor over all ranks."""
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        """Sum the gradient over all ranks."""
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


class _Synchronised(nn.modules.batchnorm._BatchNorm):
    """A batch norm that sums the mean first and then the deviations from it over the ranks, so that nothing cancels."""

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of dimensions is fine."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (B, C, ...) per channel."""
        if not self.training or not dist.is_initialized() or dist.get_world_size() == 1:
            return super().forward(input)
        x = input.float()
        over = [i for i in range(x.dim()) if i != 1]
        shape = [1, -1] + [1] * (x.dim() - 2)
        number = x.numel() // x.shape[1]
        sums = SumOverRanks.apply(torch.cat([x.sum(over), x.new_full((1,), number)]))
        count = sums[-1].detach()
        mean = sums[:-1] / count
        centred = x - mean.view(shape)
        variance = SumOverRanks.apply(centred.square().sum(over)) / count
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            with torch.no_grad():
                self.num_batches_tracked += 1
                share: Any = self.momentum
                if share is None:  # stays on the device, since reading it would wait
                    share = self.num_batches_tracked.to(self.running_mean.dtype).reciprocal()
                self.running_mean.lerp_(mean.detach().to(self.running_mean.dtype), share)
                unbiased = variance.detach() * count / (count - 1)
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), share)
        y = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
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
