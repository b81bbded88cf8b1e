"""The selective scan, its convolution, and a mixer's whole chain: one signature each, computed by what is here.

`selective_scan` and `causal_conv1d_silu` are the operators; `mixer_scan` is the chain of both that a mixer runs between
its two projections, which a kernel may fuse. Who computes them is decided once per type of device, at the first call or
by `choose_scan`: every candidate is probed against the reference before it may serve, and the log says which runs and
why the better ones do not. A package or compiler that is absent (`Missing`) and a kernel that is there and fails
(`Failing`) are different errors: the first is news, the second is alarming.

Bt batch, E channels, L steps, N states, G groups of channels that share B and C, K taps, R rank of the step size.
"""

import difflib
import importlib.util
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.errors import EnvironmentProblem
from pipeline.ops import closed_form, reference
from pipeline.ops.fused import Fused
from pipeline.ops.reference import Direction
from pipeline.ops.shapes import check_conv, check_mixer, check_scan

logger = logging.getLogger(__name__)


class Missing(EnvironmentProblem):
    """An implementation whose package, compiler or device is not here."""


class Failing(EnvironmentProblem):
    """An implementation that is here and crashes, or computes something else than the reference."""


@dataclass(frozen=True, kw_only=True)
class Operators:
    """One implementation; `scan` and `conv` have the signatures of `pipeline.ops.reference`."""

    name: str
    scan: Callable[..., Tensor | tuple[Tensor, Tensor]]
    conv: Callable[..., Tensor] = reference.causal_conv1d_silu
    mixer: Callable[..., tuple[Tensor, ...]] | None = None  # `mixer_scan` always as a tuple; None: composed


def _cuda(device: torch.device) -> Operators:
    if device.type != "cuda":
        raise Missing(f"mamba-ssm runs on CUDA, not on {device.type}")
    for package, remedy in (
        ("mamba_ssm", "mamba-ssm is not installed"),
        (
            "selective_scan_cuda",
            "mamba-ssm is built without its Mamba-1 kernel; build it with MAMBA_KEEP_CUDA_BUILD=TRUE",
        ),
    ):
        if importlib.util.find_spec(package) is None:
            raise Missing(remedy)
    try:
        from pipeline.ops import mamba_cuda
    except ImportError as error:  # installed, and built for another torch or Python
        raise Failing(f"{type(error).__name__}: {error}".splitlines()[0]) from error
    return Operators(name="cuda", scan=mamba_cuda.selective_scan)


def _triton(device: torch.device) -> Operators:
    if device.type != "cuda":
        raise Missing(f"Triton compiles for a GPU, not for {device.type}")
    if importlib.util.find_spec("triton") is None:
        raise Missing("triton is not installed")
    from pipeline.ops.triton_library import TritonLibrary

    fused = Fused(TritonLibrary())
    return Operators(name="triton", scan=fused.scan, conv=fused.conv, mixer=fused.mixer)


def _native(device: torch.device) -> Operators:
    if device.type != "cpu":
        raise Missing(f"it runs on the CPU, not on {device.type}")
    from pipeline.ops.native.build import BuildError
    from pipeline.ops.native.library import Library

    try:
        fused = Fused(Library())
    except BuildError as error:
        raise Missing(str(error)) from error
    return Operators(name="native", scan=fused.scan, conv=fused.conv, mixer=fused.mixer)


def _closed_form(device: torch.device) -> Operators:
    return Operators(name="torch", scan=closed_form.selective_scan)


def _reference(device: torch.device) -> Operators:
    return Operators(name="reference", scan=reference.selective_scan)


# In the order of preference. Each imports what it needs when called, so this file needs torch alone; a loader raises
# Missing. `cuda` is mamba-ssm's kernel, `triton` ours, `native` C++, `torch` the closed form in plain torch.
SCANS: dict[str, Callable[[torch.device], Operators]] = {
    "cuda": _cuda,
    "triton": _triton,
    "native": _native,
    "torch": _closed_form,
    "reference": _reference,
}
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


def report(device: torch.device | str = "cpu") -> list[tuple[str, float | None, str]]:
    """For a doctor: each implementation with its relative error to the reference, or None and the reason."""
    device = torch.device(device)
    rows: list[tuple[str, float | None, str]] = []
    for name, load in SCANS.items():
        try:
            rows.append((name, probe(load(device), device), "works"))
        except Missing as reason:
            rows.append((name, None, f"not available: {reason}"))
        except Failing as reason:
            rows.append((name, None, f"FAILS: {reason}"))
    return rows


def _operators(tensor: Tensor) -> Operators:
    if tensor.dtype == torch.float64:  # the kernels compute in fp32
        return _closed_form(tensor.device)
    return _chosen.get(tensor.device.type) or choose_scan("auto", tensor.device)


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
    check_scan(u, delta, A, B, C, D, z, delta_bias)
    return _operators(u).scan(
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
    check_conv(x, weight, bias)
    return _operators(x).conv(x, weight, bias, reverse=reverse)


@overload
def mixer_scan(
    xz: Tensor, directions: Sequence[Direction], *, blend: Tensor | None = ..., return_ungated: Literal[False] = ...
) -> Tensor: ...


@overload
def mixer_scan(
    xz: Tensor, directions: Sequence[Direction], *, blend: Tensor | None = ..., return_ungated: Literal[True]
) -> tuple[Tensor, ...]: ...


def mixer_scan(
    xz: Tensor, directions: Sequence[Direction], *, blend: Tensor | None = None, return_ungated: bool = False
) -> Tensor | tuple[Tensor, ...]:
    """SiLU(z) * (y_forward [+ y_backward]): all of a mixer between in_proj and out_proj, in one differentiable call.

    For each direction: v = causal_conv1d_silu(x), (low, B, C) = x_proj v, y = scan(v, dt_proj low, A, B, C, D).
    xz: (Bt, L, 2 E) as in_proj gives it, x first; `directions`: one, or two of which the second runs from the last
    step to the first. Returns o (Bt, L, E), the sum over the directions (Vim divides it by their number); with
    `return_ungated` (o, p_forward[, p_backward]), each p = C·h (Bt, L, E) without gate and skip. Four directions are
    two calls, the second on reordered steps. `blend` (Bt, directions) adds blend[:, k] p_k to o, ungated: SSMixup with
    nu psi and nu (1 - psi); it gets no gradient.

    Both directions share x, z and o, so a kernel that takes them together reads and writes those once, and the
    gradients of x, z and of each v need no sums: that is why this call exists beside the operators it is made of.
    """
    check_mixer(xz, directions, blend)
    operators = _operators(xz)
    results = (operators.mixer or _composed(operators))(xz, directions, blend=blend, return_ungated=return_ungated)
    return results if return_ungated else results[0]


def _composed(operators: Operators) -> Callable[..., tuple[Tensor, ...]]:
    """The mixer's chain out of the two operators."""

    def mixer(
        xz: Tensor, directions: Sequence[Direction], *, blend: Tensor | None, return_ungated: bool
    ) -> tuple[Tensor, ...]:
        x, z = xz.transpose(1, 2).chunk(2, dim=1)  # (Bt, E, L)
        outs, ungated = [], []
        for k, d in enumerate(directions):
            v = operators.conv(x, d.conv_weight, d.conv_bias, reverse=k == 1)
            rank, states = d.dt_proj.shape[1], d.A.shape[1]
            low, B, C = F.linear(v.transpose(1, 2), d.x_proj).split([rank, states, states], dim=2)
            delta = F.linear(low, d.dt_proj).transpose(1, 2)
            inputs = v, delta, d.A, B.transpose(1, 2), C.transpose(1, 2), d.D, z, d.dt_bias
            if return_ungated or blend is not None:
                out, p = operators.scan(*inputs, reverse=k == 1, return_ungated=True)
                ungated.append(p)
                outs.append(out if blend is None else out + blend[:, k, None, None].to(out.dtype).detach() * p)
            else:
                outs.append(operators.scan(*inputs, reverse=k == 1))
        total = outs[0] if len(outs) == 1 else outs[0] + outs[1]
        return tuple(t.transpose(1, 2) for t in ((total, *ungated) if return_ungated else (total,)))

    return mixer
