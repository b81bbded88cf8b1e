"""The mixer of Vision Mamba: a selective scan in one, two or four directions.

Shapes: B images, L tokens, D width, E = expand x D inner width, N states, R rank of the step size.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from pipeline.models.config import SSMixupConfig
from pipeline.models.layers import init_step_size_bias
from pipeline.models.vision_mamba.ssmixup import mixed_scan
from pipeline.ops.linear import Linear, linear
from pipeline.ops.scan import Direction, mixer_scan

# Suffixes of the released checkpoints: row-major, its reverse, column-major, its reverse.
DIRECTIONS = ("", "_b", "_c", "_c_b")


class Mixer(nn.Module):
    """Selective scans in several directions between one shared in-projection and one shared out-projection.

    Each direction has its own convolution, projections of the scan, A and D.

    Args:
        dim: D.
        d_state: N.
        d_conv: Taps of the causal convolution, in tokens.
        expand: E / D.
        directions: How many of `DIRECTIONS` are used: 1, 2 or 4.
        combine: How their outputs are put together.
        ssmixup: Blends opposite directions where a `blend` is given (see `ssmixup.py`); None for a plain mixer.
    """

    def __init__(
        self,
        dim: int,
        *,
        d_state: int,
        d_conv: int,
        expand: int,
        directions: int,
        combine: Literal["mean", "sum"] = "mean",
        ssmixup: SSMixupConfig | None = None,
    ) -> None:
        super().__init__()
        self.ssmixup = ssmixup
        self.divisor = directions if combine == "mean" else 1
        if ssmixup and ssmixup.nu == "learned":
            self.nu = nn.Parameter(torch.zeros(1))
        self.inner = expand * dim
        self.rank = math.ceil(dim / 16)
        self.d_state = d_state
        self.suffixes = DIRECTIONS[:directions]
        self.in_proj = Linear(dim, 2 * self.inner, bias=False)
        for s in self.suffixes:
            self.add_module(
                f"conv1d{s}", nn.Conv1d(self.inner, self.inner, d_conv, groups=self.inner, padding=d_conv - 1)
            )
            self.add_module(f"x_proj{s}", Linear(self.inner, self.rank + 2 * d_state, bias=False))
            self.add_module(f"dt_proj{s}", Linear(self.rank, self.inner))
            self.register_parameter(f"A{s}_log", nn.Parameter(torch.empty(self.inner, d_state)))
            self.register_parameter(f"D{s}", nn.Parameter(torch.empty(self.inner)))
        self.out_proj = Linear(self.inner, dim, bias=False)

    def reset_scan_parameters(self) -> None:
        """Set A = -(1..N) (S4D-real), D = 1 and step sizes log-uniform in [1e-3, 0.1], in every direction."""
        states = torch.arange(1, self.d_state + 1, dtype=torch.float32)
        for s in self.suffixes:
            with torch.no_grad():
                self.get_parameter(f"A{s}_log").copy_(states.log().expand(self.inner, -1))
                self.get_parameter(f"D{s}").fill_(1.0)
            init_step_size_bias(self.get_parameter(f"dt_proj{s}.bias"))
            nn.init.uniform_(self.get_parameter(f"dt_proj{s}.weight"), -(self.rank**-0.5), self.rank**-0.5)

    def forward(self, x: Tensor, columns: Tensor | None, blend: Tensor | None = None) -> Tensor:
        """Mix the tokens (B, L, D).

        Args:
            x: Tokens (B, L, D).
            columns: (2, L), the column-major order and its inverse; needed for four directions.
            blend: (B, 2), SSMixup's psi and 1 - psi of each image; zeros leave an image without the term.

        Returns:
            (B, L, D).
        """
        xz = self.in_proj(x)  # (B, L, 2E)
        y = self._both_ways(xz, self.suffixes[:2], blend)
        if columns is not None:
            # One gather in and one out serve both column directions.
            order, inverse = columns
            y = y + self._both_ways(xz[:, order], self.suffixes[2:], blend)[:, inverse]
        # The mean over the directions is taken on the weight, which is smaller than y.
        return linear(y, self.out_proj.weight / self.divisor)

    def _both_ways(self, xz: Tensor, suffixes: tuple[str, ...], blend: Tensor | None) -> Tensor:
        """Sum one direction, or two opposite ones with their SSMixup: (B, L, 2E) -> (B, L, E)."""
        directions = [self.direction(s) for s in suffixes]
        if self.ssmixup is None or blend is None:
            return mixer_scan(xz, directions)
        nu = self.nu if self.ssmixup.nu == "learned" else self.ssmixup.nu
        return mixed_scan(xz, directions, blend, nu, shared_C=self.ssmixup.readout == "shared_C")

    def direction(self, suffix: str) -> Direction:
        """Return the weights of the direction with this suffix, a name of `DIRECTIONS`."""
        own = self.get_parameter
        return Direction(
            own(f"conv1d{suffix}.weight"),
            own(f"conv1d{suffix}.bias"),
            own(f"x_proj{suffix}.weight"),
            own(f"dt_proj{suffix}.weight"),
            own(f"dt_proj{suffix}.bias"),  # enters inside the softplus, in fp32
            -torch.exp(own(f"A{suffix}_log").float()),
            own(f"D{suffix}"),
        )
