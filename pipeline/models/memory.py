"""Whether a model fits in this machine's memory, asked before it is built."""

from collections.abc import Callable
from typing import TypeVar

import psutil
import torch
from torch import nn

from pipeline.errors import ConfigError

WEIGHT_BYTES = 4  # fp32
TRAINED_BYTES = 16  # a weight, its gradient and AdamW's two moments, in fp32
_ROOM = 0.95  # share of the free memory that a model may take

M = TypeVar("M", bound=nn.Module)


def build_within_memory(build: Callable[[], M], name: str, *, trained: bool) -> M:
    """Build a model, unless it is larger than the memory that is free.

    The weights are counted on the meta device, where they take no memory.

    Args:
        build: Builds the model on the default device.
        name: What messages call it.
        trained: Whether it will be trained. Where there is no GPU, that takes this memory too.

    Raises:
        ConfigError: It does not fit.
    """
    weight_bytes = TRAINED_BYTES if trained and not torch.cuda.is_available() else WEIGHT_BYTES
    if torch.get_default_device().type != "meta":
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            weights = sum(value.numel() for value in build().state_dict().values())
        free = psutil.virtual_memory().available
        if weights * weight_bytes > _ROOM * free:
            raise ConfigError(
                f"{name} has {weights:.3g} weights and needs {gigabytes(weights * weight_bytes)} of memory"
                f" ({weight_bytes} bytes for each), but this machine has {gigabytes(free)} free; choose smaller widths and"
                " depths, or a larger machine"
            )
    return build()


def gigabytes(size: float) -> str:
    """Return a number of bytes for people, for example `3.4 GB`."""
    return f"{size / 1e9:.3g} GB"
