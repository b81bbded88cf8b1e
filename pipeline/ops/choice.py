"""The choice of an implementation of the operators: once per type of device, after a self-test against the reference.

The choice happens at the first call on a device, or earlier by `choose_scan`. An implementation must reproduce the
reference on a small case before it is used. The log says which one runs and why the preferred ones do not. A missing
package or compiler (`Missing`) is logged as information; a kernel that is installed and fails (`Failing`) as an error.
"""

import importlib.util
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.config import choose
from pipeline.errors import EnvironmentProblem, first_line
from pipeline.ops import closed_form, mamba_cuda, meta, reference
from pipeline.ops.composed import composed_mixer
from pipeline.ops.fused import Fused
from pipeline.ops.self_test import step_seconds, worst_error

logger = logging.getLogger(__name__)


class Missing(EnvironmentProblem):
    """The package, compiler or device of an implementation is missing."""


class Failing(EnvironmentProblem):
    """An implementation is installed, but it crashes or its results differ from the reference."""


@dataclass(frozen=True, kw_only=True)
class Operators:
    """One implementation of the operators.

    Attributes:
        name: Its key in `SCANS`, for the log.
        scan: With the signature of `pipeline.ops.reference.selective_scan`.
        conv: With the signature of `pipeline.ops.reference.causal_conv1d_silu`.
        mixer: With the signature of `pipeline.ops.scan.mixer_scan`, except that it always returns a tuple; None if the
            chain is composed of `scan` and `conv`.
    """

    name: str
    scan: Callable[..., Tensor | tuple[Tensor, Tensor]]
    conv: Callable[..., Tensor] = reference.causal_conv1d_silu
    mixer: Callable[..., tuple[Tensor, ...]] | None = None

    @property
    def whole_mixer(self) -> Callable[..., tuple[Tensor, ...]]:
        """The fused mixer, or the one that is composed of `scan` and `conv`."""
        return self.mixer or composed_mixer(self.scan, self.conv)


def _cuda(device: torch.device) -> Operators:
    if device.type != "cuda":
        raise Missing(f"the CUDA kernels run on a GPU, not on {device.type}")
    from pipeline.ops.cuda.driver import CudaError, Driver
    from pipeline.ops.cuda.library import CudaLibrary

    try:
        fused = Fused(CudaLibrary(Driver()))
    except CudaError as error:
        raise Missing(str(error)) from error
    return Operators(name="cuda", scan=fused.scan, conv=fused.conv, mixer=fused.mixer)


def _mamba_ssm(device: torch.device) -> Operators:
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
    return Operators(name="mamba_ssm", scan=mamba_cuda.selective_scan)


def _native(device: torch.device) -> Operators:
    if device.type != "cpu":
        raise Missing(f"the C++ kernels run on the CPU, not on {device.type}")
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


# In the order of preference. Each loader imports its packages when it is called, so importing this file needs only
# torch; it raises Missing if it cannot. `cuda` are our kernels, `mamba_ssm` is mamba-ssm's, `native` the C++ library, `torch`
# the closed form in plain torch.
SCANS: dict[str, Callable[[torch.device], Operators]] = {
    "cuda": _cuda,
    "mamba_ssm": _mamba_ssm,
    "native": _native,
    "torch": _closed_form,
    "reference": _reference,
}
RIVALS = ("cuda", "mamba_ssm")  # both are timed where both work, and the faster one is chosen
NEAR = 0.9
_chosen: dict[str, Operators] = {}  # by device type


def choose_scan(kind: str = "auto", device: torch.device | str = "cpu") -> Operators:
    """Choose the implementation for this type of device from now on.

    Args:
        kind: A key of `SCANS`, or "auto" for the first one that works, or the faster one of RIVALS if both work. With "auto",
            the reason why one does not work is logged and the next one is tried.
        device: Any device of the type.

    Raises:
        ConfigError: If `kind` is unknown.
        Missing: If `kind` names an implementation that is not available.
        Failing: If `kind` names an implementation that fails its self-test.
    """
    device = torch.device(device)
    choose("scan", kind, {"auto": None, **SCANS})
    absent: list[str] = []
    working: list[tuple[Operators, float]] = []
    for name in SCANS if kind == "auto" else (kind,):
        if working and name not in RIVALS:
            break
        try:
            operators = SCANS[name](device)
            # In a separate thread: the first call may happen under an autocast, or inside activation checkpointing,
            # whose hooks would confuse the tensors of the self-test with those of the block.
            with ThreadPoolExecutor(1) as thread:
                working.append((operators, thread.submit(self_test, operators, device).result()))
        except Missing as reason:
            if kind != "auto":
                raise
            absent.append(f"{name} is not available: {reason}")
        except Failing as reason:
            if kind != "auto":
                raise
            logger.error(
                "scan on %s: %s is installed but FAILS its self-test and is not used: %s", device.type, name, reason
            )
    with ThreadPoolExecutor(1) as thread:
        chosen = thread.submit(fastest, [operators for operators, _ in working], device).result()
    _chosen[device.type] = chosen
    others = f" ({'; '.join(absent)})" if absent else ""
    error = {operators.name: error for operators, error in working}[chosen.name]
    logger.info("scan on %s: %s, relative error to the reference %.1e%s", device.type, chosen.name, error, others)
    return chosen


def fastest(working: Sequence[Operators], device: torch.device, **shape: int) -> Operators:
    """Return the first implementation, or another whose training step of a mixer takes less than NEAR of its time.

    Times differ a little from start to start and from rank to rank; the margin keeps the choice the same. One implementation
    is not timed.

    Args:
        working: Implementations that passed their self-test, the preferred one first.
        device: Where they compute.
        **shape: What differs from the shape of `step_seconds`.
    """
    if len(working) == 1:
        return working[0]
    times = {operators.name: step_seconds(operators.whole_mixer, device, **shape) for operators in working}
    words = ", ".join(f"{name} {1e3 * seconds:.2f} ms" for name, seconds in times.items())
    best = min(working, key=lambda operators: times[operators.name])
    chosen = best if times[best.name] < NEAR * times[working[0].name] else working[0]
    logger.info("scan on %s: %s a mixer's step, so %s is chosen", device.type, words, chosen.name)
    return chosen


def self_test(operators: Operators, device: torch.device) -> float:
    """Compare an implementation with the reference on small cases of its scan and its mixer, also under a bf16 autocast.

    Returns:
        The largest relative error over all outputs and gradients.

    Raises:
        Failing: If the implementation raises, or the error is above 1e-3.
    """
    try:
        worst = worst_error(operators.scan, operators.mixer, device)
    except Exception as error:  # a foreign kernel may raise anything at import or launch
        raise Failing(f"{type(error).__name__}: {first_line(error)}") from error
    if not worst < 1e-3:
        raise Failing(f"its relative error to the reference is {worst:.1e}; at most 1e-3 is allowed")
    return worst


def report(device: torch.device | str = "cpu") -> list[tuple[str, float | None, str]]:
    """Test every implementation, for `doctor`.

    Returns:
        For each one its name, its relative error to the reference (None if it does not work), and a verdict in words.
    """
    device = torch.device(device)
    rows: list[tuple[str, float | None, str]] = []
    for name, load in SCANS.items():
        try:
            rows.append((name, self_test(load(device), device), "works"))
        except Missing as reason:
            rows.append((name, None, f"not available: {reason}"))
        except Failing as reason:
            rows.append((name, None, f"FAILS: {reason}"))
    return rows


def operators_for(tensor: Tensor) -> Operators:
    """Return the chosen implementation for a tensor's device and dtype."""
    if tensor.is_meta:
        return Operators(name="meta", scan=meta.selective_scan)
    if tensor.dtype == torch.float64:  # the kernels compute in fp32
        return _closed_form(tensor.device)
    return _chosen.get(tensor.device.type) or choose_scan("auto", tensor.device)
