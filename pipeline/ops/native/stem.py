"""EfficientViM's convolutions with stride 2 for inference on the CPU, compiled (stem.cpp), fp32, without autograd."""

from ctypes import addressof
from typing import cast

import torch
from torch import Tensor, nn

from pipeline.ops.native.vision import ACTIVATIONS, Layer
from pipeline.ops.native.vision_library import ConvCall, VisionLibrary, halved, pointer


class MapConv(Layer):
    """A 3x3 convolution of a map with stride 2 and zero padding, in 25 multiplications instead of 36.

    A map (B, H, W, in) -> (B, H/2, W/2, out), rounded up.
    Source: Winograd's minimal filtering F(2, 2), applied to the even rows and columns. stem.cpp has the algebra.

    Args:
        weight: (out, in, 3, 3); `in` is a multiple of 16 or 28, see `takes`.
        bias: (out,).
        act: "none" or "relu".
        library: As for `Layer`.
    """

    weight: Tensor
    bias: Tensor

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, act: str = "none", library: VisionLibrary | None = None
    ) -> None:
        super().__init__(library)
        self.outputs, self.inputs = weight.shape[:2]
        assert self.takes(self.inputs)
        assert act in ("none", "relu")
        w = weight.double()
        # The five filters of a line in pairs and one alone, first over the rows, then over the columns.
        lines = [[w[..., 0, :], w[..., 1, :]], [w[..., 2, :], w[..., 1, :]], [w[..., 0, :] + w[..., 2, :]]]
        filters = []
        for pair in lines:
            columns = [[[g[..., 0], g[..., 1]], [g[..., 2], g[..., 1]], [g[..., 0] + g[..., 2]]] for g in pair]
            filters += [g for q in range(3) for column in columns for g in column[q]]
        self.register_buffer("weight", self.library.panels(torch.cat(filters, 1), 25 * self.inputs))
        self.register_buffer("bias", self.library.row(bias, self.outputs))
        self.act = ACTIVATIONS.index(act)

    @staticmethod
    def takes(channels: int) -> bool:
        """Return whether the kernel is compiled for this number of input channels."""
        return channels % 16 == 0 or channels % 28 == 0

    def call(self, x: Tensor | None, size: tuple[int, int, int], y: Tensor | None) -> ConvCall:
        """Return the library's structure for a map of `size` (B, H, W); what is None stays in the library."""
        x_at, y_at = (None if end is None else pointer(end) for end in (x, y))
        weights = pointer(self.weight), pointer(self.bias)
        return ConvCall(*size, self.inputs, self.outputs, self.act, x_at, *weights, y_at)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to a map (B, H, W, in)."""
        batch, height, width, inputs = x.shape
        assert inputs == self.inputs
        y = x.new_empty(*halved((batch, height, width)), self.outputs)
        sizes = batch, height, width, self.inputs, self.outputs, self.act
        self.library.run("vision_conv_map", *sizes, x, self.weight, self.bias, y)
        return y


class Stem(nn.Module):
    """3x3 convolutions with stride 2 and zero padding, one after another: images (B, in, H, W) -> a map (B, H', W', out).

    Each halves the sides, rounded up.

    Args:
        one: The first convolution: weight (out, in, 3, 3), bias (out,), activation ("none" or "relu").
        more: The others, at least one; `MapConv.takes` their input channels.
        library: As for `Layer`.
    """

    weight: Tensor
    bias: Tensor

    def __init__(
        self,
        one: tuple[Tensor, Tensor | None, str],
        *more: tuple[Tensor, Tensor | None, str],
        library: VisionLibrary | None = None,
    ) -> None:
        super().__init__()
        self.more = nn.ModuleList(MapConv(*layer, library) for layer in more)
        self.library = self._maps()[0].library
        weight, bias, act = one
        assert act in ("none", "relu")
        self.outputs, self.inputs = weight.shape[:2]
        taps = weight.permute(0, 2, 3, 1).flatten(1)
        self.register_buffer("weight", self.library.panels(taps, taps.shape[1]))
        self.register_buffer("bias", self.library.row(bias, self.outputs))
        self.act = ACTIVATIONS.index(act)

    def _maps(self) -> list[MapConv]:
        return cast(list[MapConv], list(self.more))

    def forward(self, images: Tensor) -> Tensor:
        """Apply the convolutions to images (B, in, H, W)."""
        images, maps = images.contiguous(), self._maps()
        batch, inputs, height, width = images.shape
        assert inputs == self.inputs
        size = batch, height, width
        pointers = pointer(images), pointer(self.weight), pointer(self.bias), None
        one = ConvCall(*size, self.inputs, self.outputs, self.act, *pointers)
        sizes = [size := halved(size) for _ in maps]
        y = images.new_empty(*halved(size), maps[-1].outputs)
        calls = [layer.call(None, at, y if layer is maps[-1] else None) for layer, at in zip(maps, sizes, strict=True)]
        two, *others = calls
        array = (ConvCall * len(others))(*others)
        self.library.run("vision_stem", one, two, len(others), addressof(array))
        return y
