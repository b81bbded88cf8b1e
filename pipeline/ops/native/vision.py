"""Layers of EfficientViM for inference on the CPU, compiled (vision.cpp, mixer.cpp), with weights laid out for them.

fp32, without autograd. Maps are contiguous (B, H, W, C), rows (..., C). Each layer is a module that holds its packed
weights as buffers. Making the first one builds the library, and raises BuildError where there is no compiler.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from ctypes import Array, Structure
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.ops.native.vision_library import (
    DepthwiseCall,
    FfnCall,
    LinearCall,
    LocalCall,
    MixerCall,
    VisionLibrary,
    WidenCall,
    halved,
    padded,
    pointer,
    vision_library,
)

ACTIVATIONS = ("none", "relu", "silu", "sigmoid")  # layers.h: Act
STATES = 16  # the mixer's states are padded to a multiple of it


def _taps(weight: Tensor) -> Tensor:
    """(C, 1, 3, 3) -> (9, C)."""
    return weight.flatten(1).t().contiguous().float()


class Layer(nn.Module):
    """Base of the compiled layers.

    Args:
        library: The library to call; by default this machine's.
    """

    def __init__(self, library: VisionLibrary | None) -> None:
        super().__init__()
        self.library = library or vision_library()


class Prepared(Layer, ABC):
    """Base of the modules that call the library once for many layers; the structures with their weights are made once.

    Making the structures for the blocks of a Vim-Small takes half a millisecond. They belong to the weights of the first call, so
    weights are changed through this module or one around it, not through one of its layers.

    Args:
        library: As for `Layer`.
    """

    def __init__(self, library: VisionLibrary | None) -> None:
        super().__init__(library)
        self._made: tuple[Structure | Array[Any], list[Tensor]] | None = None

    @abstractmethod
    def prepare(self) -> Structure | Array[Any]:
        """Return the structures, which point into the tensors of this module."""

    def structures(self) -> Structure | Array[Any]:
        """Return the structures. The caller holds them while the library runs."""
        made = self._made
        if made is None:
            made = self._made = self.prepare(), list(self.buffers())  # the tensors into which they point stay alive
        return made[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._made = None  # `fn` replaces the tensors
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any) -> None:
        self._made = None  # so may a state
        super()._load_from_state_dict(*args)

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_made": None}  # a copy has tensors of its own


class Linear(Layer):
    """act(x W' + b): (..., in) -> (..., out).

    Args:
        weight: (out, in).
        bias: (out,).
        act: One of `ACTIVATIONS`.
        library: As for `Layer`.
    """

    weight: Tensor
    bias: Tensor

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, act: str = "none", library: VisionLibrary | None = None
    ) -> None:
        super().__init__(library)
        self.outputs, self.inputs = weight.shape
        self.register_buffer("weight", self.library.panels(weight))
        self.register_buffer("bias", self.library.row(bias, self.outputs))
        self.act = ACTIVATIONS.index(act)

    def weights(self) -> LinearCall:
        """Return the library's structure without rows."""
        return LinearCall(0, self.inputs, self.outputs, self.act, None, pointer(self.weight), pointer(self.bias), None)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to rows (..., in)."""
        assert x.shape[-1] == self.inputs
        y = x.new_empty(*x.shape[:-1], self.outputs)
        sizes = x.numel() // self.inputs, self.inputs, self.outputs, self.act
        self.library.run("vision_linear", *sizes, x, self.weight, self.bias, y)
        return y


class Local(Layer):
    """Base of the layers that begin with a 3x3 depthwise convolution, written DWConv, of their map.

    Args:
        local: The convolution: weight (C, 1, 3, 3) and bias (C,).
        library: As for `Layer`.
    """

    taps: Tensor
    taps_bias: Tensor

    def __init__(self, local: tuple[Tensor, Tensor], library: VisionLibrary | None = None) -> None:
        super().__init__(library)
        weight, bias = local
        self.channels = len(weight)
        self.register_buffer("taps", _taps(weight))
        self.register_buffer("taps_bias", bias.float().clone())

    def local(self) -> LocalCall:
        """Return the library's structure for the convolution without a map."""
        return LocalCall(0, 0, self.channels, None, pointer(self.taps), pointer(self.taps_bias))

    def call(self, x: Tensor) -> LocalCall:
        """Return the library's structure for the convolution over `x` (B, H, W, C)."""
        _, height, width, channels = x.shape
        assert channels == self.channels
        return LocalCall(height, width, channels, pointer(x), pointer(self.taps), pointer(self.taps_bias))


class FeedForward(Local):
    """t + W2 relu(W1 t + b1) + b2 with t = DWConv(x): a map (B, H, W, C) -> a map of the same shape.

    Args:
        local: As for `Local`.
        up: W1, (hidden, C).
        up_bias: b1, (hidden,).
        down: W2, (C, hidden).
        down_bias: b2, (C,).
        library: As for `Layer`.
    """

    up: Tensor
    up_bias: Tensor
    down: Tensor
    down_bias: Tensor

    def __init__(
        self,
        local: tuple[Tensor, Tensor],
        up: Tensor,
        up_bias: Tensor,
        down: Tensor,
        down_bias: Tensor,
        library: VisionLibrary | None = None,
    ) -> None:
        super().__init__(local, library)
        self.hidden = len(up)
        self.register_buffer("up", self.library.panels(up))
        self.register_buffer("up_bias", self.library.row(up_bias, self.hidden))
        self.register_buffer("down", self.library.panels(down))
        self.register_buffer("down_bias", self.library.row(down_bias, self.channels))

    def weights(self) -> FfnCall:
        """Return the library's structure without a map."""
        return FfnCall(self.local(), 0, self.hidden, *map(pointer, self._weights()), None)

    def _weights(self) -> tuple[Tensor, ...]:
        return self.up, self.up_bias, self.down, self.down_bias

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to a map (B, H, W, C)."""
        y = torch.empty_like(x)
        self.library.run("vision_ffn", self.call(x), len(x), self.hidden, *self._weights(), y)
        return y


class Widen(Layer):
    """relu(DWConv(relu(x W' + b))) with stride 2: a map (B, H, W, in) -> (B, H/2, W/2, out), rounded up.

    Args:
        weight: W of the wide layer, (out, in).
        bias: b of the wide layer, (out,).
        taps: Weight of the 3x3 depthwise convolution, (out, 1, 3, 3).
        taps_bias: Its bias, (out,).
        library: As for `Layer`.
    """

    weight: Tensor
    bias: Tensor
    taps: Tensor
    taps_bias: Tensor

    def __init__(
        self, weight: Tensor, bias: Tensor, taps: Tensor, taps_bias: Tensor, library: VisionLibrary | None = None
    ) -> None:
        super().__init__(library)
        self.outputs, self.inputs = weight.shape
        self.register_buffer("weight", self.library.panels(weight))
        self.register_buffer("bias", self.library.row(bias, self.outputs))
        self.register_buffer("taps", _taps(taps))
        self.register_buffer("taps_bias", taps_bias.float().clone())

    def weights(self) -> WidenCall:
        """Return the library's structure without a map."""
        return WidenCall(0, 0, 0, self.inputs, self.outputs, None, *map(pointer, self._weights()), None)

    def _weights(self) -> tuple[Tensor, ...]:
        return self.weight, self.bias, self.taps, self.taps_bias

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to a map (B, H, W, in)."""
        batch, height, width, inputs = x.shape
        assert inputs == self.inputs
        y = x.new_empty(*halved((batch, height, width)), self.outputs)
        self.library.run("vision_widen", batch, height, width, inputs, self.outputs, x, *self._weights(), y)
        return y


class Depthwise(Local):
    """DWConv(x): a map (B, H, W, C) -> a map of the same shape."""

    def weights(self) -> DepthwiseCall:
        """Return the library's structure without a map."""
        return DepthwiseCall(self.local(), 0, None)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to a map (B, H, W, C)."""
        y = torch.empty_like(x)
        self.library.run("vision_depthwise", self.call(x), len(x), y)
        return y


class Mixer(Local):
    """HSM-SSD with the layers around it: a map (B, H, W, D) -> (the map, hidden states (B, N, D)).

    x' = DWConv(x), t = LN(x') and (b, c, d) = DWConv(t P). Then s = (softmax(d) b) t and
    h = ((s Wh) (SiLU(s Wz) + skip)) Wo. The outputs are x' + c' h and h (EfficientViM, section 3.2).

    Args:
        local: DWConv of x, as for `Local`.
        rows: The numbers of rows of b, c and d: N, N, and N or 1.
        eps: Epsilon of the layer norm.
        gamma: Weight of the layer norm, (D,).
        beta: Bias of the layer norm, (D,).
        project: P, (sum of `rows`, D).
        spread: DWConv of the projection, (sum of `rows`, 1, 3, 3).
        to_h: Wh, (E, D).
        to_gate: Wz, (E, D).
        skip: (E,) or (1,).
        to_out: Wo, (D, E).
        library: As for `Layer`.
    """

    def __init__(
        self,
        local: tuple[Tensor, Tensor],
        *,
        rows: Sequence[int],
        eps: float,
        gamma: Tensor,
        beta: Tensor,
        project: Tensor,
        spread: Tensor,
        to_h: Tensor,
        to_gate: Tensor,
        skip: Tensor,
        to_out: Tensor,
        library: VisionLibrary | None = None,
    ) -> None:
        super().__init__(local, library)
        self.states, self.inner, self.eps = rows[0], len(to_h), eps
        self.padded_states = self.states + -self.states % STATES

        # b, c and d with padded states. A d of one row serves all states.
        def groups(rows_of: Tensor) -> Tensor:
            b, c, d = rows_of.split(list(rows))
            d = d.expand(self.states, *d.shape[1:])
            pad = (0, 0) * (rows_of.dim() - 1) + (0, self.padded_states - self.states)
            return torch.cat([F.pad(group, pad) for group in (b, c, d)])

        buffers = {
            "gamma": self.library.row(gamma, self.channels),
            "beta": self.library.row(beta, self.channels),
            "project": self.library.panels(groups(project)),
            "spread": _taps(groups(spread)),
            "to_h": self.library.panels(to_h),
            "to_gate": self.library.panels(to_gate),
            "skip": self.library.row(skip.expand(self.inner), self.inner),
            "to_out": self.library.panels(to_out),
        }
        self.names = list(buffers)
        for name, value in buffers.items():
            self.register_buffer(name, value)

    def weights(self) -> MixerCall:
        """Return the library's structure without a map."""
        weights = [pointer(getattr(self, name)) for name in self.names]
        return MixerCall(self.local(), 0, self.padded_states, self.inner, self.eps, *weights)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output map (B, H, W, D) and the hidden states (B, N, D)."""
        batch, height, width, channels = x.shape
        wide, states = padded(channels), self.padded_states
        y, h = torch.empty_like(x), x.new_empty(batch, states, wide)
        tokens = x.new_empty(batch, height * width, wide)
        scratch = (
            tokens,
            x.new_empty(batch, height * width, 3 * states),
            x.new_empty(batch, height * width, states),
            x.new_empty(batch, states, wide),
        )
        weights = [self._buffers[name] for name in self.names]
        self.library.run("vision_mixer", self.call(x), batch, states, self.inner, self.eps, *weights, y, *scratch, h)
        return y, h[:, : self.states, :channels]
