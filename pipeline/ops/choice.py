"""Who computes the operators: chosen once per type of device, loudly, after a probe against the reference.

At the first call on a device, or earlier by `choose_scan`: every candidate must reproduce the reference on a small case
before it may serve, and the log says which runs and why the better ones do not. A package or compiler that is absent
(`Missing`) and a kernel that is there and fails (`Failing`) are different errors: the first is news, the second is
alarming.
"""

import difflib
import importlib.util
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.errors import EnvironmentProblem
from pipeline.ops import closed_form, mamba_cuda, meta, reference
from pipeline.ops.fused import Fused

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
    mixer: Callable[..., tuple[Tensor, ...]] | None = None  # `scan.mixer_scan`, always a tuple; None: composed


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
    absent = []
    for name in SCANS if kind == "auto" else (kind,):
        try:
            operators = SCANS[name](device)
            # In a thread of its own: the first call may come from inside activation checkpointing, whose hooks would
            # take the probe's tensors for the block's, or from under an autocast.
            with ThreadPoolExecutor(1) as thread:
                error = thread.submit(probe, operators, device).result()
        except Missing as reason:
            if kind != "auto":
                raise
            absent.append(f"{name} is not available: {reason}")
        except Failing as reason:
            if kind != "auto":
                raise
            logger.error("scan on %s: %s is installed but FAILS and is passed over: %s", device.type, name, reason)
        else:
            _chosen[device.type] = operators
            others = f" ({'; '.join(absent)})" if absent else ""
            logger.info("scan on %s: %s, relative error to the reference %.1e%s", device.type, name, error, others)
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
        except Exception as error:  # whatever a foreign kernel raises at import or launch is the finding itself
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


def operators_for(tensor: Tensor) -> Operators:
    """The chosen implementation for a tensor's device and dtype."""
    if tensor.is_meta:
        return Operators(name="meta", scan=meta.selective_scan)
    if tensor.dtype == torch.float64:  # the kernels compute in fp32
        return _closed_form(tensor.device)
    return _chosen.get(tensor.device.type) or choose_scan("auto", tensor.device)
