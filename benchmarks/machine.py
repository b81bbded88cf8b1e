"""The machine of a measurement: its processor, what its instructions are, and how much others use it.

This file imports no torch, so that a switch of the instruction set can be set before torch is imported.
"""

import functools
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

# What makes torch, its libraries and our compiled code use a narrower instruction set. ONNX Runtime has no such switch.
NARROWER = {
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "DNNL_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "baseline": {"ATEN_CPU_CAPABILITY": "default", "DNNL_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
}
QUIET = 0.05  # largest share of the processor's time that others may have used in a quiet run


@functools.cache
def flags() -> frozenset[str]:
    """Return what the processor can do, in Linux's words; empty where there is no /proc/cpuinfo."""
    for line in _cpuinfo():
        if line.startswith("flags"):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


def multiplies_bf16() -> bool:
    """Whether the processor multiplies bf16, and this process may use it: elsewhere a bf16 step takes minutes."""
    return bool({"avx512_bf16", "amx_bf16"} & flags()) and os.environ.get("ATEN_CPU_CAPABILITY") in (None, "avx512")


def instructions() -> str:
    """Name the widest vector instructions that this process uses: AVX-512, AVX2, or none of both."""
    narrowed = os.environ.get("ATEN_CPU_CAPABILITY", "avx512")
    if narrowed == "avx512" and {"avx512f", "avx512dq", "avx512bw", "avx512vl"} <= flags():
        return "AVX-512" + (" with bf16" if multiplies_bf16() else "")
    return "AVX2" if narrowed != "default" and {"avx2", "fma"} <= flags() else "baseline"


def processor() -> str:
    """Name the processor, its generation and its number of usable cores; clouds hide the model behind names like "AMD EPYC"."""
    said = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(_cpuinfo()))}
    name = said.get("model name") or platform.processor() or platform.machine()
    generation = (
        f" (family {said['cpu family']}, model {said['model']})" if {"cpu family", "model"} <= said.keys() else ""
    )
    return f"{name}{generation}, {_cores()} cores"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass
class Watch:
    """Measures the share of the processor's time that others use while the children of this process run."""

    def __post_init__(self) -> None:
        self._start = time.perf_counter()
        self._busy, self._own = self._used()

    def _used(self) -> tuple[float, float]:
        every, own = psutil.cpu_times(), os.times()
        idle = every.idle + getattr(every, "iowait", 0.0)
        # The times of guests, which come after the first eight, are counted among these already.
        return sum(every[:8]) - idle, own.children_user + own.children_system

    def others(self) -> float:
        """Return the share since the start, from 0 to 1; children that still run count as others."""
        busy, own = self._used()
        whole = (time.perf_counter() - self._start) * (os.cpu_count() or 1)
        return min(1.0, max(0.0, (busy - self._busy - (own - self._own)) / whole))
