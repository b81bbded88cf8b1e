"""The peak FLOP/s of a device: the denominator of model FLOPs utilisation (MFU)."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

# Dense FLOP/s from the makers' data sheets: (bf16 tensor cores, fp32 without TF32).
_GPUS: dict[str, tuple[float, float]] = {
    "B200": (2250e12, 75e12),
    "H200": (989e12, 67e12),
    "H100 PCIe": (756e12, 51e12),
    "H100": (989e12, 67e12),
    "A100": (312e12, 19.5e12),
    "A40": (149.7e12, 37.4e12),
    "A10": (125e12, 31.2e12),
    "L40S": (362e12, 91.6e12),
    "L4": (121e12, 30.3e12),
    "RTX 4090": (165e12, 82.6e12),
}
_SIDE = 1024


def of_data_sheet(name: str, precision: str) -> float | None:
    """Return the peak FLOP/s of the GPU in whose name a known one occurs, or None.

    Args:
        name: As torch names the device, for example `NVIDIA A100-SXM4-80GB`.
        precision: fp32 or bf16.
    """
    peaks = next((peaks for known, peaks in _GPUS.items() if known in name), None)
    return None if peaks is None else peaks[0] if precision == "bf16" else peaks[1]


def peak_flops(device: torch.device, precision: str) -> float:
    """Return the peak FLOP/s of one device.

    A known GPU has the number of its data sheet. Any other device has that of torch's matrix product, measured here and now, so
    an MFU of 1 on a CPU means "as fast as torch multiplies matrices". Where oneDNN does so faster (`pipeline.ops.linear`),
    convolutions and the project's own layers can exceed 1.

    Args:
        device: The device of one rank.
        precision: fp32 or bf16.
    """
    if device.type == "cuda":
        known = of_data_sheet(torch.cuda.get_device_name(device), precision)
        if known:
            return known
    return measured_flops(torch.mm, device, torch.bfloat16 if precision == "bf16" else torch.float32)


def measured_flops(multiply: Callable[[Tensor, Tensor], Tensor], device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of a product of two square matrices, the best of five.

    Args:
        multiply: Computes the product.
        device: Where the matrices are.
        dtype: Their type.
    """
    a, b = (torch.ones(_SIDE, _SIDE, dtype=dtype, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        _wait(device)
        begin = time.perf_counter()
        multiply(a, b)
        _wait(device)
        best = min(best, time.perf_counter() - begin)
    return 2 * _SIDE**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
