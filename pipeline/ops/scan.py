"""The selective scan and its convolution: one signature, several implementations, chosen once and loudly.

`selective_scan` and `causal_conv1d_silu` are what models call. Who computes them is decided at the first call on a
device, or earlier by `choose_scan`: every candidate is probed against the reference before it may serve, and one log
line says which runs and why the better ones do not. A package that is absent (`Missing`) and a kernel that is there
and fails (`Failing`) are different errors: the first is news, the second is alarming.

Bt batch, E channels, L steps, N states, G groups of channels that share B and C, K taps.
"""

import difflib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, overload

import torch
from torch import Tensor

from pipeline.errors import EnvironmentProblem
from pipeline.ops import reference

logger = logging.getLogger(__name__)


class Missing(EnvironmentProblem):
    """An implementation whose package, compiler or device is not here."""


class Failing(EnvironmentProblem):
    """An implementation that is here and crashes, or computes something else than the reference."""


@dataclass(frozen=True, kw_only=True)
class Operators:
    """The two operators of one implementation; the functions have the signatures of `pipeline.ops.reference`."""

    name: str
    scan: Callable[..., Tensor | tuple[Tensor, Tensor]]
    conv: Callable[..., Tensor]


def _reference(device: torch.device) -> Operators:
    return Operators(name="reference", scan=reference.selective_scan, conv=reference.causal_conv1d_silu)


def _native(device: torch.device) -> Operators:
    from pipeline.ops.native.build import BuildError
    from pipeline.ops.native.operators import Kernels

    if device.type != "cpu":
        raise Missing(f"the native kernel runs on the CPU, not on {device.type}")
    try:
        kernels = Kernels()
    except BuildError as error:
        raise Missing(str(error)) from error
    return Operators(name="native", scan=kernels.scan, conv=kernels.conv)


def _cuda(device: torch.device) -> Operators:
    raise Missing("no CUDA kernel is wired yet")


# In the order of preference. Each loads late, so that importing this file needs torch alone; a loader raises Missing.
SCANS: dict[str, Callable[[torch.device], Operators]] = {"cuda": _cuda, "native": _native, "reference": _reference}
_chosen: dict[str, Operators] = {}  # by device type


def choose_scan(kind: str = "auto", device: torch.device | str = "cpu") -> Operators:
    """Decide who computes the operators on this type of device from now on; `auto` takes the first that works.

    A forced kind that is missing or fails raises; in `auto` the reason is logged and the next one is tried.
    """
    device = torch.device(device)
    if kind != "auto" and kind not in SCANS:
        nearest = difflib.get_close_matches(kind, SCANS, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"scan {kind!r} is not one of auto, {', '.join(SCANS)}{hint}")
    for name in SCANS if kind == "auto" else (kind,):
        try:
            operators = SCANS[name](device)
            error = probe(operators, device)
        except Missing as reason:
            if kind != "auto":
                raise
            logger.info("scan on %s: %s is not available: %s", device.type, name, reason)
        except Failing as reason:
            if kind != "auto":
                raise
            logger.error("scan on %s: %s is installed but FAILS and is passed over: %s", device.type, name, reason)
        else:
            _chosen[device.type] = operators
            logger.info("scan on %s: %s runs (relative error to the reference %.1e)", device.type, name, error)
            return operators
    raise AssertionError("the reference serves everywhere")


def probe(operators: Operators, device: torch.device) -> float:
    """Largest relative error to the reference over outputs and gradients of a small case; Failing above 1e-3."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 20, 19), (2, 20, 19), (20, 5), (2, 5, 19), (2, 5, 19), (20,), (2, 20, 19), (20,)]
    values = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
    values[2] = -values[2].exp()
    results = []
    for scan in (operators.scan, reference.selective_scan):
        inputs = [value.clone().requires_grad_() for value in values]
        try:
            with torch.enable_grad():
                out, ungated = scan(*inputs, reverse=True, return_ungated=True)
                results.append([out, ungated, *torch.autograd.grad((out * ungated.cos()).sum(), inputs)])
        except Exception as error:  # whatever a foreign kernel raises is the finding itself, and is re-raised by name
            raise Failing(f"{type(error).__name__}: {error}".splitlines()[0]) from error
    worst = max(
        float(((got - want).abs().max() / want.abs().max()).detach()) for got, want in zip(*results, strict=True)
    )
    if not worst < 1e-3:
        raise Failing(f"relative error {worst:.1e} to the reference where 1e-3 is allowed")
    return worst


def _operators(device: torch.device) -> Operators:
    return _chosen.get(device.type) or choose_scan("auto", device)


@overload
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = ...,
    z: Tensor | None = ...,
    delta_bias: Tensor | None = ...,
    *,
    delta_softplus: bool = ...,
    reverse: bool = ...,
    return_ungated: Literal[False] = ...,
) -> Tensor: ...


@overload
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = ...,
    z: Tensor | None = ...,
    delta_bias: Tensor | None = ...,
    *,
    delta_softplus: bool = ...,
    reverse: bool = ...,
    return_ungated: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    *,
    delta_softplus: bool = True,
    reverse: bool = False,
    return_ungated: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """o = (C·h + D u) SiLU(z) with h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t and dt = softplus(delta + delta_bias).

    u, delta, z: (Bt, E, L), any strides, fp32 or bf16 (others are computed, not fast); A: (E, N), negative, fp32;
    B, C: (Bt, N, L), or (Bt, G, N, L) where E/G neighbouring channels share a group; D, delta_bias: (E,), fp32.
    Computed in fp32 (fp64 for fp64 inputs). Returns o (Bt, E, L) in u's dtype; with `return_ungated` also
    p = C·h (Bt, E, L): no gate, no skip, which SSMixup blends. `reverse` scans from L-1 to 0 with the outputs in the
    original order: flip-scan-flip without the flips. Differentiable in every tensor.
    """
    _check_scan(u, delta, A, B, C, D, z, delta_bias)
    return _operators(u.device).scan(
        u,
        delta,
        A,
        B,
        C,
        D,
        z,
        delta_bias,
        delta_softplus=delta_softplus,
        reverse=reverse,
        return_ungated=return_ungated,
    )


def causal_conv1d_silu(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, reverse: bool = False) -> Tensor:
    """SiLU(depthwise causal convolution + bias): output t sees steps t-K+1..t, or t..t+K-1 with `reverse`.

    x: (Bt, E, L), any strides; weight: (E, 1, K); bias: (E,). Returns (Bt, E, L) in x's dtype.
    `reverse` equals flip-conv-flip. Differentiable in every tensor.
    """
    _check_conv(x, weight, bias)
    return _operators(x.device).conv(x, weight, bias, reverse=reverse)


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def _check_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
) -> None:
    if u.dim() != 3 or u.shape[2] == 0 or not u.is_floating_point():
        raise ValueError(f"u must be floating point of shape (batch, channels, steps >= 1), got {_shape(u)} {u.dtype}")
    for name, tensor in (("delta", delta), ("z", z)):
        if tensor is not None and tensor.shape != u.shape:
            raise ValueError(f"{name} must have the shape of u, {_shape(u)}, got {_shape(tensor)}")
    batch, channels, steps = u.shape
    if A.dim() != 2 or A.shape[0] != channels or A.shape[1] == 0:
        raise ValueError(f"A must have shape (channels, states) = ({channels}, N >= 1), got {_shape(A)}")
    states = A.shape[1]
    for name, tensor in (("B", B), ("C", C)):
        plain = tensor.shape == (batch, states, steps)
        grouped = (
            tensor.dim() == 4
            and tensor.shape[1] > 0
            and channels % tensor.shape[1] == 0
            and tensor.shape == (batch, tensor.shape[1], states, steps)
        )
        if not plain and not grouped:
            raise ValueError(
                f"{name} must have shape {(batch, states, steps)}, or {(batch, 'G', states, steps)} with G dividing "
                f"the {channels} channels, got {_shape(tensor)}"
            )
    if B.shape != C.shape:
        raise ValueError(f"B and C must be grouped alike, got {_shape(B)} and {_shape(C)}")
    for name, tensor in (("D", D), ("delta_bias", delta_bias)):
        if tensor is not None and tensor.shape != (channels,):
            raise ValueError(f"{name} must have shape ({channels},), got {_shape(tensor)}")


def _check_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if x.dim() != 3 or x.shape[2] == 0 or not x.is_floating_point():
        raise ValueError(f"x must be floating point of shape (batch, channels, steps >= 1), got {_shape(x)} {x.dtype}")
    channels = x.shape[1]
    if weight.dim() != 3 or weight.shape[:2] != (channels, 1) or weight.shape[2] == 0:
        raise ValueError(f"weight must have shape (channels, 1, taps) = ({channels}, 1, K >= 1), got {_shape(weight)}")
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"bias must have shape ({channels},), got {_shape(bias)}")
