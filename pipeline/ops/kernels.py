"""What a set of compiled kernels offers, so that one piece of autograd (fused.py) serves C++ and Triton alike.

Kernels know no autograd, no dtype but fp32 and bf16, and take tensors with any strides. Bt batch, E channels, L steps,
N states, G groups, K taps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

Filter = tuple[Tensor, Tensor | None]  # weight (E, 1, K), bias (E,): contiguous fp32


class ScanInputs(NamedTuple):
    """One direction's own inputs (A, D and bias contiguous fp32), or their gradients."""

    u: Tensor  # (Bt, E, L)
    delta: Tensor  # (Bt, E, L)
    A: Tensor  # (E, N)
    B: Tensor  # (Bt, N, L) or (Bt, G, N, L)
    C: Tensor  # as B
    D: Tensor | None  # (E,)
    bias: Tensor | None  # (E,)


@dataclass(frozen=True, kw_only=True)
class ScanProblem:
    """One or two directions whose outputs are summed: o = sum_k ((p_k + D_k u_k) SiLU(z) + blend_k p_k), p = C·h."""

    inputs: Sequence[ScanInputs]
    reverses: Sequence[bool]
    z: Tensor | None  # (Bt, E, L)
    blend: Tensor | None  # (directions, Bt), contiguous fp32; gets no gradient
    softplus: bool


class Kernels(Protocol):
    """Outputs follow the layout of u (or x): channels last in memory if it has them so, else steps last."""

    def scan_forward(
        self, problem: ScanProblem, *, ungated: bool, keep: bool
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """o; each direction's p if `ungated`; what the backward wants to find again if `keep`, one each."""

    def scan_backward(
        self,
        problem: ScanProblem,
        carries: Sequence[Tensor],
        g_o: Tensor,
        g_ps: Sequence[Tensor],
        g_z: Tensor | None,
    ) -> list[ScanInputs]:
        """The gradients of each direction's inputs, of A, B, C, D and bias in fp32; z's is written into `g_z`."""

    def conv_forward(self, x: Tensor, filters: Sequence[Filter], reverses: Sequence[bool]) -> list[Tensor]:
        """SiLU(conv(x)) (Bt, E, L) for each filter."""

    def conv_backward(
        self, x: Tensor, filters: Sequence[Filter], reverses: Sequence[bool], g_outs: Sequence[Tensor], g_x: Tensor
    ) -> list[Filter]:
        """Gradients of each filter, in fp32; x's, summed over the directions, is written into `g_x`."""
