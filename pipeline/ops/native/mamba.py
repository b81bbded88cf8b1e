"""Layers of Vision Mamba for inference on the CPU, compiled (mamba.cpp), with weights laid out for them.

fp32, without autograd. Each layer is a module that holds its packed weights as buffers. Making the first one builds the
library, and raises BuildError where there is no compiler.

Shapes: B images, L tokens, D width, E inner width, N states, R rank of the step size, K taps, W lanes of a vector.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.ops.native.vision import STATES, Layer
from pipeline.ops.native.vision_library import PAD, DirectionCall, VisionLibrary, padded, pointer
from pipeline.ops.reference import Direction


class Memory:
    """Tensors that the blocks of one call use in turn.

    Fresh memory costs a page fault for every 4 KiB. At 448 pixels and 8 images these took a fifth of Vim-Small's time.
    """

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}

    def take(self, name: str, like: Tensor, *shape: int) -> Tensor:
        """Return an uninitialised tensor; the last one of this name is no longer needed."""
        known = self._tensors.get(name)
        if known is None or known.shape != shape:
            known = self._tensors[name] = like.new_empty(shape)
        return known


class Norm(NamedTuple):
    """A norm before a linear layer.

    Attributes:
        eps: Epsilon of the norm.
        weight: (D,).
        bias: (D,) of a layer norm; None for an RMS norm.
    """

    eps: float
    weight: Tensor
    bias: Tensor | None

    def into(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return weight (out, D) and bias (out,) of the linear layer with the norm's own weight and bias folded in."""
        offset = weight.new_zeros(len(weight)) if bias is None else bias
        if self.bias is not None:
            offset = offset + weight @ self.bias
        return weight * self.weight, offset


class NormedLinear(Layer):
    """norm(x) W' + b: (..., D) -> (..., out).

    Args:
        norm: The norm.
        weight: (out, D).
        bias: (out,).
        library: As for `Layer`.
    """

    weight: Tensor
    bias: Tensor

    def __init__(
        self, norm: Norm, weight: Tensor, bias: Tensor | None = None, library: VisionLibrary | None = None
    ) -> None:
        super().__init__(library)
        self.outputs, self.inputs = weight.shape
        self.centred, self.eps = norm.bias is not None, norm.eps
        weight, bias = norm.into(weight, bias)
        self.register_buffer("weight", self.library.panels(weight))
        self.register_buffer("bias", self.library.row(bias, self.outputs))

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        """Apply the layer to rows (..., D); the result is in `memory`."""
        y = memory.take("xz", x, *x.shape[:-1], self.outputs)
        sizes = x.numel() // self.inputs, self.inputs, self.outputs, self.centred, self.eps
        self.library.run("mamba_normed", *sizes, x, self.weight, self.bias, y)
        return y


class PackedDirection(Layer):
    """The weights of one direction of a mixer, and the order in which it reads the tokens.

    Args:
        direction: The weights; every one of them is needed except the biases and D.
        library: As for `Layer`.
    """

    def __init__(self, direction: Direction, library: VisionLibrary | None = None) -> None:
        super().__init__(library)
        d, rank = direction, direction.dt_proj.shape[1]
        inner, states = d.A.shape
        self.inner, self.states, self.rank, self.taps = inner, states, rank, d.conv_weight.shape[-1]
        wide, more = padded(inner), self.padded_states - states
        low, b, c = d.x_proj.split([rank, states, states])
        project = torch.cat([F.pad(low, (0, 0, 0, -rank % PAD)), *(F.pad(of, (0, 0, 0, more)) for of in (b, c))])
        lanes = self.library.panel // 2
        rates = F.pad(d.A.float() / math.log(2), (0, more, 0, wide - inner))  # the kernel computes powers of two
        buffers = {
            "filter": F.pad(d.conv_weight.flatten(1).t(), (0, wide - inner)).contiguous().float(),
            "filter_bias": self.library.row(d.conv_bias, inner),
            "project": self.library.panels(project),
            "spread": self.library.panels(d.dt_proj),
            "spread_bias": self.library.row(d.dt_bias, inner),
            "rates": rates.view(wide // lanes, lanes, -1).transpose(1, 2).contiguous(),
            "skip": self.library.row(d.D, inner),
        }
        self.names = list(buffers)
        for name, value in buffers.items():
            self.register_buffer(name, value)

    @property
    def padded_states(self) -> int:
        """N as the kernel counts it."""
        return self.states + -self.states % (STATES if self.states > STATES // 2 else STATES // 2)

    def call(self, tokens: Tensor) -> DirectionCall:
        """Return the library's structure for reading the tokens in the order `tokens`, (L,) int64."""
        assert tokens.dtype == torch.int64
        assert tokens.is_contiguous()
        return DirectionCall(tokens.data_ptr(), *(pointer(getattr(self, name)) for name in self.names))


class Scans(Layer):
    """The scans of all directions, without gate: xz (B, L, 2E) -> (directions, B, E / W, L, W).

    E is padded to a multiple of `PAD`; nothing is written beyond the last vector of channels.

    Args:
        directions: One, two or four; their sizes agree.
        library: As for `Layer`.
    """

    def __init__(self, directions: Sequence[Direction], library: VisionLibrary | None = None) -> None:
        super().__init__(library)
        self.directions = nn.ModuleList(PackedDirection(d, library) for d in directions)

    def forward(self, xz: Tensor, orders: Sequence[Tensor], memory: Memory) -> Tensor:
        """Scan the tokens; `orders` holds for each direction the token at each step, (L,) int64. The result is in `memory`."""
        first = self.directions[0]
        assert isinstance(first, PackedDirection)
        (batch, steps, _), count, inner = xz.shape, len(self.directions), first.inner
        wide, states, lanes = padded(inner), first.padded_states, self.library.panel // 2
        y = memory.take("y", xz, count, batch, wide // lanes, steps, lanes)
        # With fewer images and directions than threads, these hold what the recurrence reads; else it stays in the cache.
        apart = count * batch < torch.get_num_threads()
        widths = {"v": wide, "delta": wide, "low": padded(first.rank) + 2 * states}
        scratch = [memory.take(n, xz, count * batch, steps, width) if apart else None for n, width in widths.items()]
        calls = (DirectionCall * 4)(
            *(d.call(order) for d, order in zip(self.directions, orders, strict=True))  # type: ignore[operator]
        )
        sizes = batch, steps, inner, states, first.rank, first.taps, count
        self.library.run("mamba_scan", *sizes, xz, y, *scratch, calls)
        return y


class GatedLinear(Layer):
    """x + ((sum over the directions of y) SiLU(z)) W': the end of a mixer.

    Args:
        weight: (D, E).
        library: As for `Layer`.
    """

    weight: Tensor

    def __init__(self, weight: Tensor, library: VisionLibrary | None = None) -> None:
        super().__init__(library)
        self.outputs, self.inner = weight.shape
        self.register_buffer("weight", self.library.panels(weight))

    def forward(self, y: Tensor, xz: Tensor, x: Tensor) -> None:
        """Join y, as `Scans` gives it, and the gates in xz (B, L, 2E), and add the result to x (B, L, D) in place."""
        batch, steps, _ = xz.shape
        self.library.run("mamba_gate", batch, steps, self.inner, self.outputs, len(y), y, xz, self.weight, x)


class NormedSwiGLU(Layer):
    """x + W3 (SiLU(W1 t + b1) (W2 t + b2)) + b3 with t = norm(x): (..., D) -> (..., D).

    Args:
        norm: The norm.
        one: W1 and b1, (H, D) and (H,).
        two: W2 and b2, (H, D) and (H,).
        three: W3 and b3, (D, H) and (D,).
        library: As for `Layer`.
    """

    both: Tensor
    both_bias: Tensor
    down: Tensor
    down_bias: Tensor

    def __init__(
        self,
        norm: Norm,
        one: tuple[Tensor, Tensor],
        two: tuple[Tensor, Tensor],
        three: tuple[Tensor, Tensor],
        library: VisionLibrary | None = None,
    ) -> None:
        super().__init__(library)
        self.width, self.hidden = three[0].shape
        self.centred, self.eps = norm.bias is not None, norm.eps
        lanes, more = self.library.panel // 2, padded(self.hidden) - self.hidden
        # W columns of W1 beside W of W2, so that both sums of a hidden unit meet in registers.
        folded = [norm.into(*layer) for layer in (one, two)]
        both = torch.stack([F.pad(w, (0, 0, 0, more)).unflatten(0, (-1, lanes)) for w, _ in folded], dim=1)
        biases = torch.stack([F.pad(b, (0, more)).unflatten(0, (-1, lanes)) for _, b in folded], dim=1)
        self.register_buffer("both", self.library.panels(both.flatten(0, 2)))
        self.register_buffer("both_bias", self.library.row(biases.flatten(), biases.numel()))
        self.register_buffer("down", self.library.panels(three[0]))
        self.register_buffer("down_bias", self.library.row(three[1], self.width))

    def forward(self, x: Tensor) -> None:
        """Add the layer to rows x (..., D) in place."""
        sizes = x.numel() // self.width, self.width, self.hidden, self.centred, self.eps
        self.library.run("mamba_swiglu", *sizes, self.both, self.both_bias, self.down, self.down_bias, x)
