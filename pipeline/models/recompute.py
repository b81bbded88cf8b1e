"""Batch norms under activation checkpointing: a block that is computed again must not count its images twice."""

from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def count_images_once(model: nn.Module) -> None:
    """Stop the batch norms of `model` from updating their running statistics inside a backward pass.

    Checkpointed blocks run again there, so without this each step would apply the momentum twice. It is done with hooks, so
    that it also holds where a model calls torch's checkpoint itself, as timm's do. Outputs and gradients in training do not
    depend on the running statistics.
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.num_batches_tracked is not None:
            module.register_forward_pre_hook(_hold)
            # A recomputation ends with an exception as soon as it has the tensors it needs; hence always_call.
            module.register_forward_hook(_release, always_call=True)


def _hold(module: Any, inputs: Any) -> None:
    # -1 means that no backward pass is running. A compiled graph is recomputed without its side effects.
    if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
        # The statistics must still be passed to the norm: a recomputation has to save as many tensors as the first pass did.
        module.held = module.momentum, module.num_batches_tracked
        module.momentum, module.num_batches_tracked = 0.0, None


def _release(module: Any, inputs: Any, output: Any) -> None:
    if "held" in module.__dict__:
        module.momentum, module.num_batches_tracked = module.__dict__.pop("held")
