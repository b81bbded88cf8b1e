"""The interface of a set of compiled kernels, so that one autograd file (fused.py) serves both C++ and Triton.

Kernels know no autograd. They compute fp32 and bf16 and take tensors with any strides, some by a slower way.
Bt batch, E channels, L steps, N states, G groups, K taps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

Filter = tuple[Tensor, Tensor | None]  # weight (E, 1, K), bias (E,): contiguous fp32


class ScanInputs(NamedTuple):
    """The inputs of one direction, or their gradients; A, D and bias are contiguous fp32."""

    u: Tensor  # (Bt, E, L)
    delta: Tensor  # (Bt, E, L)
    A: Tensor  # (E, N)
    B: Tensor  # (Bt, N, L) or (Bt, G, N, L)
    C: Tensor  # as B
    D: Tensor | None  # (E,)
    bias: Tensor | None  # (E,)


class Projections(NamedTuple):
    """The two products of a direction between its u and its scan. All tensors have one dtype."""

    u: Tensor  # (Bt L, E)
    x_proj: Tensor  # (R + 2 N, E)
    dt_proj: Tensor  # (E, R)
    projected: Tensor  # u x_proj^T, (Bt L, R + 2 N): R columns for delta, then B and C


@dataclass(frozen=True, kw_only=True)
class ScanProblem:
    """One or two directions whose outputs are summed: o = sum_k ((p_k + D_k u_k) SiLU(z) + blend_k p_k), p = C·h.

    Attributes:
        inputs: The inputs of each direction.
        reverses: Whether each direction runs from the last step to the first.
        z: The gate, (Bt, E, L).
        blend: (directions, Bt), contiguous fp32; it gets no gradient.
        softplus: Whether dt is softplus(delta + bias), or delta + bias itself.
        filters: If given, every `inputs[k].u` is x, and the scan's u is SiLU(conv(x)), computed where x is loaded. The
            gradient of u remains that of the scan's u. Only for kernels with `fuses_convolution`.
    """

    inputs: Sequence[ScanInputs]
    reverses: Sequence[bool]
    z: Tensor | None
    blend: Tensor | None
    softplus: bool
    filters: Sequence[Filter] = ()


class Kernels(Protocol):
    """Compiled kernels. Outputs have the memory layout of u (or x): channels last if u has that layout, else steps last.

    Attributes:
        fuses_convolution: Whether the scan takes `ScanProblem.filters`. Then the backward of a mixer needs no u in memory.
    """

    fuses_convolution: bool

    def scan_forward(
        self, problem: ScanProblem, *, ungated: bool, keep: bool
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Compute the scan.

        Args:
            problem: What to compute.
            ungated: Whether to return p = C·h of each direction.
            keep: Whether to return what `scan_backward` needs of each direction.

        Returns:
            o (Bt, E, L); the p of each direction, or none; the carries of each direction, or none.
        """

    def scan_backward(
        self,
        problem: ScanProblem,
        carries: Sequence[Tensor],
        g_o: Tensor,
        g_ps: Sequence[Tensor],
        g_z: Tensor | None,
    ) -> list[ScanInputs]:
        """Compute the gradients of the scan.

        Args:
            problem: As given to `scan_forward`.
            carries: What `scan_forward` returned with `keep`.
            g_o: Gradient at o.
            g_ps: Gradients at the p of each direction; empty if these were not returned.
            g_z: Receives the gradient of z; None without a gate.

        Returns:
            The gradients of each direction's inputs; those of A, B, C, D and bias are fp32.
        """

    def conv_forward(self, x: Tensor, filters: Sequence[Filter], reverses: Sequence[bool]) -> list[Tensor]:
        """Return SiLU(conv(x)), (Bt, E, L), for each filter."""

    def conv_backward(
        self, x: Tensor, filters: Sequence[Filter], reverses: Sequence[bool], g_outs: Sequence[Tensor], g_x: Tensor
    ) -> list[Filter]:
        """Return the gradients of each filter in fp32; write that of x, summed over the directions, into `g_x`."""

    def project(self, u: Tensor, x_proj: Tensor, dt_proj: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the inputs of a scan that depend on u. All tensors have one dtype.

        Args:
            u: (Bt, L, E).
            x_proj: (R + 2 N, E).
            dt_proj: (E, R).

        Returns:
            projected = u x_proj^T, (Bt, L, R + 2 N), which are R columns for delta, then B and C; and delta, (Bt, L, E), the
            product of those columns with dt_proj^T.
        """

    def project_backward(
        self, given: Projections, g_delta: Tensor, g_projected: Tensor, g_u: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compute the gradients of `project`. All tensors have one dtype.

        Args:
            given: The inputs of `project` and what it returned.
            g_delta: Gradient at delta, (Bt L, E).
            g_projected: Gradient at `projected`, (Bt L, R + 2 N). On entry it has the columns of B and C. The first R are
                written.
            g_u: On entry the gradient that reaches u through the scan, (Bt L, E). That through the projections is added in place.

        Returns:
            The gradients of x_proj and dt_proj.
        """
