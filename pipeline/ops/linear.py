"""Matrix products in fp32 on a CPU, by the faster of the two libraries that torch brings.

torch multiplies fp32 matrices by MKL, whose kernels for AMD processors are those of AVX2. Where such a processor has AVX-512,
oneDNN's kernels use it: on a Zen 5 they take half the time, on a Zen 4 about the same (docs/scan.md). So there the linear layers
of Vision Mamba, ARM, VSSD and LoRA are oneDNN's, forward and backward, and, in our compiled mixer, the projections that its
kernels leave to torch. All other products are torch's. The rule measures nothing: a run that is resumed on the same processor
with the same settings computes the same.
"""

import functools
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from pipeline.ops.eager import is_plain_fp32_on_cpu

# Multiply-adds. A call of oneDNN costs more than one of MKL, so about here, and with few rows, both take the same time.
_SMALLEST, _FEWEST_ROWS = 2**20, 4


@functools.cache
def onednn_is_faster() -> bool:
    """Return whether this is an AMD processor with AVX-512, and torch has oneDNN."""
    cpuinfo = Path("/proc/cpuinfo")
    amd = cpuinfo.is_file() and "AuthenticAMD" in cpuinfo.read_text()
    return amd and torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.backends.mkldnn.is_available()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute x W^T + b like `torch.nn.functional.linear`; by oneDNN without the transforms of `torch.func`.

    Args:
        x: (..., in), of any strides.
        weight: W, (out, in), of any strides.
        bias: b, (out,), or none.

    Returns:
        (..., out).
    """
    if not _by_onednn(x, weight, bias):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return _Linear.apply(x, weight, bias)
    return _product(x, weight, bias)


def weight_gradient(g: Tensor, x: Tensor) -> Tensor:
    """Compute G^T X, the gradient of a weight from that of the outputs, G (rows, out), and the inputs, X (rows, in).

    oneDNN copies a left matrix that is a transpose, so there the narrower matrix is left.

    Returns:
        (out, in).
    """
    if g.shape[1] > x.shape[1] and _by_onednn(g.t(), x.t()):
        return linear(x.t(), g.t()).t()
    return linear(g.t(), x.t())


class Linear(nn.Linear):
    """`torch.nn.Linear` by `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return linear(input, self.weight, self.bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # As in torch, only what a gradient needs is kept: not the input of a frozen weight.
        of_x, of_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        g_rows = g.flatten(0, -2)
        return (
            linear(g, weight.t()) if of_x else None,
            weight_gradient(g_rows, x.flatten(0, -2)) if of_weight else None,
            g_rows.sum(0) if of_bias else None,
        )


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    return (
        is_plain_fp32_on_cpu(x, weight, *(() if bias is None else (bias,)))
        and x.dim() > 1
        and weight.dim() == 2
        and x.shape[-1] == weight.shape[1]
        and (bias is None or bias.shape == weight.shape[:1])
        and x.numel() * len(weight) >= _SMALLEST
        and x.numel() >= _FEWEST_ROWS * x.shape[-1]
        and onednn_is_faster()
        and bool(torch.backends.mkldnn.enabled)
        and not torch.is_autocast_enabled("cpu")
    )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows = _dense(x.flatten(0, -2))
    bias = None if bias is None else bias.contiguous()
    y: Tensor = torch.ops.mkldnn._linear_pointwise(rows, _dense(weight), bias, "none", [], "")
    # A view would not let the caller change the result in place.
    return torch.ops.aten._unsafe_view(y, [*x.shape[:-1], len(weight)])


def _dense(matrix: Tensor) -> Tensor:
    """Return the matrix as rows that lie one number after another, or as the transpose of a matrix without gaps.

    Of any other matrix this is a copy. oneDNN takes a transpose with gaps too, but hundreds of times as long.
    """
    rows, columns = matrix.shape
    across, along = matrix.stride()
    if (along == 1 and across >= columns) or (across == 1 and along == rows):
        return matrix
    return matrix.t().contiguous().t() if across == 1 else matrix.contiguous()


if torch.backends.mkldnn.is_available():

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _flops(x: torch.Size, weight: torch.Size, *_: Any, **__: Any) -> int:
        return 2 * x.numel() * weight[0]
