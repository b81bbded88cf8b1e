"""Activation checkpointing and batch norms: a block computed a second time must not count its images twice."""

from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def count_images_once(model: nn.Module) -> None:
    """Let no batch norm of `model` move its running statistics inside a backward pass, where checkpointed blocks run again.

    Without this every step would move them by momentum twice. Hooks, so that it holds for whatever calls torch's checkpoint
    (timm's models do so themselves). Predictions and gradients in training do not depend on the running statistics.
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.num_batches_tracked is not None:
            module.register_forward_pre_hook(_hold)
            # A recomputation stops by an exception as soon as it has what it wants.
            module.register_forward_hook(_release, always_call=True)


def _hold(module: Any, inputs: Any) -> None:
    # -1: no backward is under way. A compiled graph is recomputed without its side effects.
    if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
        # The statistics themselves must be handed on: a recomputation has to save as many tensors as the first pass did.
        module.held = module.momentum, module.num_batches_tracked
        module.momentum, module.num_batches_tracked = 0.0, None


def _release(module: Any, inputs: Any, output: Any) -> None:
    if "held" in module.__dict__:
        module.momentum, module.num_batches_tracked = module.__dict__.pop("held")
