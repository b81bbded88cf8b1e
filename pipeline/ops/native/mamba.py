"""Blocks of Vision Mamba for inference on the CPU, compiled (mamba.cpp), with weights laid out for them.

fp32, without autograd. Each class is a module that holds its packed weights as buffers. Making the first one builds the
library, and raises BuildError where there is no compiler.

Shapes: B images, L tokens, D width, E inner width, N states, R rank of the step size, K taps, W lanes of a vector.
"""

import math
from collections.abc import Sequence
from ctypes import Array, addressof
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.ops.native.vision import STATES, Layer, Prepared
from pipeline.ops.native.vision_library import PAD, BlockCall, DirectionCall, VisionLibrary, padded, pointer
from pipeline.ops.reference import Direction


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


class SwiGLU(NamedTuple):
    """The second half of a block: x + W3 (SiLU(W1 t + b1) (W2 t + b2)) + b3 with t = norm(x).

    Attributes:
        norm: The norm.
        one: W1 and b1, (H, D) and (H,).
        two: W2 and b2, (H, D) and (H,).
        three: W3 and b3, (D, H) and (D,).
    """

    norm: Norm
    one: tuple[Tensor, Tensor]
    two: tuple[Tensor, Tensor]
    three: tuple[Tensor, Tensor]


class PackedDirection(Layer):
    """The weights of one direction of a mixer, and the order in which it reads the tokens.

    Args:
        direction: The weights; every one of them is needed except the biases and D.
        order: The token at each step, (L,) int64.
        library: As for `Layer`.
    """

    tokens: Tensor

    def __init__(self, direction: Direction, order: Tensor, library: VisionLibrary | None = None) -> None:
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
        self.register_buffer("tokens", order.contiguous())

    @property
    def padded_states(self) -> int:
        """N as the kernel counts it."""
        return self.states + -self.states % (STATES if self.states > STATES // 2 else STATES // 2)

    def weights(self) -> DirectionCall:
        """Return the library's structure."""
        assert self.tokens.dtype == torch.int64
        return DirectionCall(self.tokens.data_ptr(), *(pointer(getattr(self, name)) for name in self.names))


class Block(Layer):
    """A block: x += ((sum over the directions of their scans of v) SiLU(z)) Wo' with v, z = norm(x) Wi', then its SwiGLU.

    Args:
        norm: The norm.
        project: Wi, (2E, D).
        directions: One, two or four, each with the token at each step, (L,) int64. Their sizes agree.
        join: Wo, (D, E).
        swiglu: The SwiGLU after it, if there is one.
        library: As for `Layer`.
    """

    def __init__(
        self,
        norm: Norm,
        project: Tensor,
        directions: Sequence[tuple[Direction, Tensor]],
        join: Tensor,
        swiglu: SwiGLU | None = None,
        library: VisionLibrary | None = None,
    ) -> None:
        super().__init__(library)
        self.width, self.inner = join.shape
        self.centred, self.eps, self.swiglu = norm.bias is not None, norm.eps, swiglu is not None
        self.hidden, self.hidden_centred, self.hidden_eps = 0, False, 0.0
        project, bias = norm.into(project, None)
        buffers: dict[str, Tensor] = {
            "project": self.library.panels(project),
            "project_bias": self.library.row(bias, 2 * self.inner),
            "join": self.library.panels(join),
        }
        if swiglu:
            self.hidden, self.hidden_centred = len(swiglu.one[0]), swiglu.norm.bias is not None
            self.hidden_eps = swiglu.norm.eps
            buffers |= self._swiglu(swiglu)
        self.names = list(buffers)
        for name, value in buffers.items():
            self.register_buffer(name, value)
        self.directions = nn.ModuleList(PackedDirection(d, order, library) for d, order in directions)

    def sizes(self) -> tuple[int, ...]:
        """Return D, E, and R, N and L of each direction."""
        directions = (d for d in self.directions if isinstance(d, PackedDirection))
        return self.width, self.inner, *(n for d in directions for n in (d.rank, d.states, len(d.tokens)))

    def _swiglu(self, swiglu: SwiGLU) -> dict[str, Tensor]:
        lanes, more = self.library.panel // 2, padded(self.hidden) - self.hidden
        # W columns of W1 beside W of W2, so that both sums of a hidden unit meet in registers.
        folded = [swiglu.norm.into(*layer) for layer in (swiglu.one, swiglu.two)]
        both = torch.stack([F.pad(w, (0, 0, 0, more)).unflatten(0, (-1, lanes)) for w, _ in folded], dim=1)
        biases = torch.stack([F.pad(b, (0, more)).unflatten(0, (-1, lanes)) for _, b in folded], dim=1)
        return {
            "both": self.library.panels(both.flatten(0, 2)),
            "both_bias": self.library.row(biases.flatten(), biases.numel()),
            "down": self.library.panels(swiglu.three[0]),
            "down_bias": self.library.row(swiglu.three[1], self.width),
        }

    def weights(self) -> BlockCall:
        """Return the library's structure."""
        directions = [d for d in self.directions if isinstance(d, PackedDirection)]
        first = directions[0]
        sizes = self.inner, first.padded_states, first.rank, first.taps, len(directions)
        return BlockCall(
            *sizes,
            self.centred,
            self.hidden,
            self.hidden_centred,
            self.eps,
            self.hidden_eps,
            *(pointer(getattr(self, name)) for name in self.names),
            direction=(DirectionCall * 4)(*(d.weights() for d in directions)),
        )


class Blocks(Prepared):
    """Blocks one after another, in one call: (B, L, D) -> the same tensor, changed.

    Args:
        blocks: At least one; they have the same D, E, R, N, L and directions.
        library: As for `Layer`.
    """

    def __init__(self, blocks: Sequence[Block], library: VisionLibrary | None = None) -> None:
        super().__init__(library)
        assert len({block.sizes() for block in blocks}) == 1
        self.blocks = nn.ModuleList(blocks)

    def prepare(self) -> Array[Any]:
        """As `Prepared.prepare`."""
        return (BlockCall * len(self.blocks))(*(block.weights() for block in self.blocks))  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        """Run all blocks on x (B, L, D) in place, and return it."""
        batch, steps, width = x.shape
        block, threads = self.blocks[0], torch.get_num_threads()
        assert isinstance(block, Block)
        directions, wide, first = len(block.directions), padded(block.inner), block.directions[0]
        assert isinstance(first, PackedDirection)
        assert (steps, width) == (len(first.tokens), block.width)
        slots, units = min(batch, threads), batch % threads * directions
        xz = x.new_empty(slots, steps, 2 * block.inner)
        y = x.new_empty(slots, directions, wide, steps)
        widths = wide, wide, padded(first.rank) + 2 * first.padded_states
        apart = [x.new_empty(units, steps, w) if units < threads else None for w in widths]
        calls = self.structures()
        self.library.run("mamba_blocks", batch, steps, width, len(self.blocks), addressof(calls), x, xz, y, *apart)
        return x
