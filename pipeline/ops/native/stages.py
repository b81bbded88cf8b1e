"""Stages, downsamplers and pooling of EfficientViM for inference on the CPU, compiled (stages.cpp): one call for many layers.

fp32, without autograd. Maps are contiguous (B, H, W, C).
"""

from collections.abc import Sequence
from ctypes import Array, Structure, addressof
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.ops.native.vision import Depthwise, FeedForward, Layer, Linear, Mixer, Prepared, Widen
from pipeline.ops.native.vision_library import DownsampleLayers, StageBlock, VisionLibrary, halved, padded


class Stage(Prepared):
    """Blocks one after another: a map (B, H, W, D) -> (the map, the hidden states of the last block).

    Args:
        blocks: The mixer and the feed-forward of each block; all have the same sizes.
        library: As for `Layer`.
    """

    def __init__(self, blocks: Sequence[tuple[Mixer, FeedForward]], library: VisionLibrary | None = None) -> None:
        super().__init__(library)
        assert len({(mixer.channels, mixer.states, mixer.inner, ffn.hidden) for mixer, ffn in blocks}) == 1
        self.mixers = nn.ModuleList(mixer for mixer, _ in blocks)
        self.ffns = nn.ModuleList(ffn for _, ffn in blocks)

    def prepare(self) -> Array[Any]:
        """As `Prepared.prepare`."""
        pairs = zip(self.mixers, self.ffns, strict=True)
        blocks = [StageBlock(mixer.weights(), ffn.weights()) for mixer, ffn in pairs]  # type: ignore[operator]
        return (StageBlock * len(blocks))(*blocks)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the map (B, H, W, D) and the hidden states (B, N, D padded), of which the first D of each row count."""
        batch, height, width, channels = x.shape
        mixer = self.mixers[-1]
        assert isinstance(mixer, Mixer)
        assert channels == mixer.channels
        y, hidden = x.new_empty(x.shape), x.new_empty(batch, mixer.padded_states, padded(channels))
        calls = self.structures()
        self.library.run("vision_stage", batch, height, width, len(self.mixers), addressof(calls), x, y, hidden)
        return y, hidden[:, : mixer.states]


class Downsample(Prepared):
    """A downsampler: a map (B, H, W, D) -> (B, H/2, W/2, out), rounded up.

    It is last(narrow(m s)) with m = widen(first(x)) and the factors s = excite(squeeze(mean of m)) of an image.

    Args:
        first: The depthwise convolution before it.
        widen: The wide layer, which halves the map.
        squeeze: The first layer of the squeeze-and-excitation.
        excite: The second one.
        narrow: The last dense layer.
        last: The depthwise convolution after it.
        library: As for `Layer`.
    """

    def __init__(
        self,
        first: Depthwise,
        widen: Widen,
        squeeze: Linear,
        excite: Linear,
        narrow: Linear,
        last: Depthwise,
        library: VisionLibrary | None = None,
    ) -> None:
        super().__init__(library)
        self.first, self.widen, self.last = first, widen, last
        self.squeeze, self.excite, self.narrow = squeeze, excite, narrow

    def prepare(self) -> Structure:
        """As `Prepared.prepare`."""
        layers = self.first, self.widen, self.squeeze, self.excite, self.narrow, self.last
        return DownsampleLayers(*(layer.weights() for layer in layers))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layers to a map (B, H, W, D)."""
        batch, height, width, channels = x.shape
        assert channels == self.first.channels
        half = halved((batch, height, width))
        narrow, y = (x.new_empty(*half, self.narrow.outputs) for _ in range(2))
        means, factors = (x.new_empty(batch, self.widen.outputs) for _ in range(2))
        squeezed, wide = x.new_empty(batch, self.squeeze.outputs), x.new_empty(*half, self.widen.outputs)
        scratch = x.new_empty(x.shape), wide, means, squeezed, factors, narrow
        calls = self.structures()
        self.library.run("vision_downsample", batch, height, width, addressof(calls), x, y, *scratch)
        return y


class Pool(Layer):
    """The mean over the rows of norm(x s): (B, rows, C or more) -> (B, C).

    Args:
        scale: s, (C,).
        eps: Epsilon of the layer norm, which has no weight and no bias; None for no norm.
        library: As for `Layer`.
    """

    scale: Tensor

    def __init__(self, scale: Tensor, eps: float | None, library: VisionLibrary | None = None) -> None:
        super().__init__(library)
        self.eps, self.width = eps, len(scale)
        self.register_buffer("scale", scale.float().clone())

    def forward(self, x: Tensor, to: Tensor) -> None:
        """Pool x (B, rows, C or more) into `to` (B, C); both may be parts of larger tensors."""
        assert x.dtype == to.dtype == torch.float32
        assert x.is_cpu
        assert to.is_cpu
        assert to.shape == (len(x), self.width)
        assert x.shape[2] >= self.width
        assert x.stride(2) == to.stride(1) == 1
        sizes = len(x), x.shape[1], self.width, x.stride(0), x.stride(1), to.stride(0), self.eps is not None
        self.library.run("vision_pool", *sizes, self.eps or 0.0, x.data_ptr(), self.scale, to.data_ptr())
