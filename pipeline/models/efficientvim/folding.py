"""What a fused EfficientViM is made of: convolutions and linear maps whose weights have absorbed other operations.

They hold buffers and no parameters, since they are never trained. Weights are folded in float64 and stored in float32.

Shapes: B images, D channels, H x W pixels of a map.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.efficientvim.blocks import ConvNorm

# Maps of up to so many pixels: there a 1x1 convolution is written as one product over all images. ONNX Runtime convolves
# image by image, and would read the last stage's large weights anew for each.
FEW_PIXELS = 16


class Conv(nn.Module):
    """Convolution on channels-last maps, then a sum, then ReLU if `act`.

    Args:
        weight: Kernel (out, in / groups, k, k); the padding keeps the size of the map.
        bias: (out,).
        stride: Pixels.
        groups: Groups of the convolution.
        act: Whether a ReLU comes last.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, *, stride: int = 1, groups: int = 1, act: bool = False
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight.contiguous(memory_format=torch.channels_last))
        self.register_buffer("bias", bias)
        self.stride, self.padding, self.groups, self.act = stride, weight.shape[-1] // 2, groups, act

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """(B, in, H, W) -> (B, out, H / stride, W / stride), rounded up; `add`, of that shape, is summed in."""
        few = int(x.shape[2]) * int(x.shape[3]) <= FEW_PIXELS
        if few and self.weight.shape[-1] == 1:
            return self._product(x, add)
        y = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, 1, self.groups)
        y = y if add is None else add + y
        return F.relu(y) if self.act else y

    def _product(self, x: Tensor, add: Tensor | None) -> Tensor:
        channels, height, width = map(int, x.shape[1:])
        y = F.linear(x.permute(0, 2, 3, 1).reshape(-1, channels), self.weight[:, :, 0, 0], self.bias)
        if add is not None:
            y = add.permute(0, 2, 3, 1).reshape(-1, len(self.weight)) + y
        y = F.relu(y) if self.act else y
        return y.view(-1, height, width, len(self.weight)).permute(0, 3, 1, 2)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "relu": F.relu,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
}


class Linear(nn.Module):
    """Linear map of the last dimension, then an activation.

    Args:
        weight: (out, in).
        bias: (out,).
        act: A name of `ACTIVATIONS`.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None = None, act: str = "none") -> None:
        super().__init__()
        self.register_buffer("weight", weight.contiguous())
        self.register_buffer("bias", bias)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return ACTIVATIONS[self.act](F.linear(x, self.weight, self.bias))


def folded(layer: ConvNorm) -> tuple[Tensor, Tensor]:
    """Fold a layer's batch norm into its convolution: kernel and bias, in float64."""
    norm, weight = layer.norm, layer.conv.weight.detach().double()
    assert norm.running_var is not None
    assert norm.running_mean is not None
    scale = norm.weight.detach().double() / (norm.running_var.double() + norm.eps).sqrt()
    return weight * scale[:, None, None, None], norm.bias.detach().double() - norm.running_mean.double() * scale


def conv(layer: ConvNorm, scale: Tensor | None = None) -> Conv:
    """Write a layer as one convolution, its output multiplied by `scale` (out,)."""
    weight, bias = folded(layer)
    if scale is not None:
        weight, bias = weight * scale[:, None, None, None], bias * scale
    c = layer.conv
    return Conv(weight.float(), bias.float(), stride=c.stride[0], groups=c.groups, act=layer.act)


def depthwise(layer: ConvNorm, gate: Tensor | None, inputs: Tensor | None) -> Conv:
    """Write a residual depthwise branch as one convolution.

    Args:
        layer: The depthwise layer f.
        gate: g (D,) of (1 - g) x + g f(x); None for x + f(x).
        inputs: Factors (D,) that the input must still be multiplied by, if any.
    """
    weight, bias = folded(layer)
    identity = torch.zeros_like(weight)
    identity[:, :, weight.shape[2] // 2, weight.shape[3] // 2] = 1
    if gate is None:
        weight = weight + identity
    else:
        weight, bias = gate[:, None, None, None] * weight + (1 - gate)[:, None, None, None] * identity, gate * bias
    if inputs is not None:
        weight = weight * inputs[:, None, None, None]
    return Conv(weight.float(), bias.float(), groups=len(bias))
