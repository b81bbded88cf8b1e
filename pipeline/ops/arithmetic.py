"""How a GPU computes, chosen in one place and logged: its precision, its choice of algorithms, the layout of images."""

import logging

import torch

logger = logging.getLogger(__name__)


def choose_arithmetic(device: torch.device) -> None:
    """Let a GPU multiply fp32 as fp32, and let cuDNN time its algorithms for each shape once; nothing changes on a CPU."""
    if device.type != "cuda":
        return
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    logger.info("arithmetic: TF32 off in products and convolutions, cudnn.benchmark on, images channels last")


def image_layout(device: torch.device) -> torch.memory_format:
    """Return the memory layout of a batch of images.

    A convolution keeps the layout of its input, so that of the images reaches a whole network. cuDNN's bf16 kernels compute
    channels last; the weights keep torch's own layout, because ZeRO cuts them as flat tensors. On a CPU torch's batch norm of
    such images adds the pixels of a channel in fp32 one after another, so one process and two would differ by more than rounding.
    """
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format
