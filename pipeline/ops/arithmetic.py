"""How a GPU computes, chosen in one place and logged: its precision and its choice of algorithms."""

import logging

import torch

logger = logging.getLogger(__name__)


def choose_arithmetic(device: torch.device) -> None:
    """Let a GPU multiply fp32 as fp32, and let cuDNN time its algorithms for each shape once; nothing changes on a CPU."""
    if device.type != "cuda":
        return
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    logger.info("arithmetic: TF32 off in products and convolutions, cudnn.benchmark on")
