"""When a kernel that torch's tracers cannot see may serve: on plain tensors, while nothing traces the caller."""

import torch
from torch import Tensor, nn


def is_plain_fp32_on_cpu(*tensors: Tensor) -> bool:
    """Return whether these are plain fp32 tensors in a CPU's memory, and no compiler or exporter traces the caller.

    A tracer may show tensors of unknown sizes. So ask this before anything that compares a size.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return all(
        type(t) in (Tensor, nn.Parameter) and t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors
    )
