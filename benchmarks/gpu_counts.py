"""Compile GPU kernels, disassemble them and count: registers, instructions, and the clocks of each unit.

`benchmarks/gpu_static.py` explains the method.
"""

import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import which

import torch

from benchmarks import sass
from pipeline.errors import EnvironmentProblem
from pipeline.ops.cuda.counted import COUNTED, GPUS, Gpu, Way
from pipeline.ops.cuda.program import FOLDER, THREADS, Program

STATES, TAPS = 16, 4
# Instructions per state-step of mamba-ssm 2.3.2.post1 on sm_80 for up to 256 steps, as `count_mamba` finds them with CUDA 13.0.
# A hand-count of its longest variants, whose scans over threads cover more steps of each, gives 17 and 55.
MAMBA: dict[Way, float] = {"forward": 42.0, "backward": 84.3}


@dataclass(frozen=True, kw_only=True)
class Count:
    """What one kernel needs on one architecture; instructions and clocks are for 1000 state-steps, `issued` for one."""

    name: str
    arch: str
    registers: int
    spilled: int
    shared: int
    blocks: int
    issued: float
    shuffles: float
    shared_accesses: float
    issue_clocks: float
    pipe_clocks: float
    pipe: str


def tool(name: str) -> str:
    """Return the path of nvcc or nvdisasm: on the PATH, or in NVIDIA's packages."""
    packages = [str(path) for folder in sys.path for path in Path(folder).glob(f"nvidia/*/bin/{name}")]
    found = which(name) or next(iter(packages), None)
    if found is None:
        raise EnvironmentProblem(
            f"{name} is missing: put it on the PATH, or type .venv/bin/python -m pip install -e '.[kernels]'"
        )
    return found


def compile_cubin(source: Path, arch: str, options: Sequence[str]) -> tuple[str, str]:
    """Return the disassembly of a CUDA file, and what ptxas tells about it."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        command = [
            tool("nvcc"),
            "-cubin",
            f"-arch={arch}",
            "-O3",
            "-Xptxas",
            "-v",
            *options,
            str(source),
            "-o",
            str(cubin),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise EnvironmentProblem(f"nvcc does not compile {source.name}: {done.stderr.strip()[:300]}")
        text = subprocess.run([tool("nvdisasm"), "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    return text, done.stdout + done.stderr


def compile_program(program: Program, arch: str) -> tuple[str, str]:
    """Return the disassembly of one of our programs, and what ptxas tells about it."""
    options = ["-std=c++17", f"-I{FOLDER}", *program.macros(), "-Xptxas", program.assembler_option(arch)]
    return compile_cubin(FOLDER / program.source, arch, options)


def resources(told: str, kernel: str) -> tuple[int, int]:
    """Return registers and spilled bytes of a kernel, from what ptxas tells."""
    part = told[told.index(f"entry function '{kernel}'") :]
    found = [re.search(pattern, part) for pattern in (r"Used (\d+) registers", r"(\d+) bytes spill stores")]
    registers, stores = (int(match.group(1)) for match in found if match)
    return registers, stores


def clocks(operations: Counter[str], state_steps: float, gpu: Gpu) -> tuple[dict[str, float], float, float]:
    """Return the clocks of each unit for 1000 state-steps, and shuffles and shared accesses of one.

    Args:
        operations: What a warp issues.
        state_steps: Those that one lane gets done with it.
        gpu: One of the architecture.
    """
    lanes: Counter[str] = Counter()
    shuffles = accesses = 0
    for operation, count in operations.items():
        base = operation.split(".")[0]
        if base == "MUFU":
            lanes["special functions"] += 32 * count / 16
        elif base in ("FFMA", "FMUL", "FADD", "FSETP", "FSEL", "FMNMX"):
            lanes["fp32"] += 32 * count / gpu.float_lanes
        elif base in ("F2F", "F2FP", "I2F", "F2I"):
            lanes["conversions"] += 32 * count / gpu.convert_lanes
        elif base in ("IMAD", "IADD3", "LOP3", "ISETP", "SHF", "LEA", "SEL", "IMNMX", "PRMT", "VIADD", "VIMNMX"):
            lanes["integers"] += 32 * count / 64
        elif base in ("LDS", "STS", "SHFL"):
            words = 4 if ".128" in operation else 2 if ".64" in operation else 1
            lanes["shared memory"] += words * count
            shuffles += count if base == "SHFL" else 0
            accesses += count if base != "SHFL" else 0
        lanes["issue"] += count / 4
    scale = 1000 / 32 / state_steps
    return {unit: value * scale for unit, value in lanes.items()}, shuffles / state_steps, accesses / state_steps


def count_kernel(name: str, program: Program, kernel: str, arch: str, steps: int) -> Count:
    """Compile and count one of our scans."""
    gpu = GPUS[COUNTED[arch]]
    text, told = compile_program(program, arch)
    blocks = sass.kernels(text)[kernel]
    operations: Counter[str] = Counter()
    for loop in _innermost_with_exponentials(blocks, sass.loops(blocks)):
        operations += sass.heaviest_path(blocks, loop, {})
    registers, spilled = resources(told, kernel)
    always, movable = program.forward_bytes(steps) if kernel == "scan_forward" else program.backward_bytes(steps)
    fits = always + movable <= gpu.shared // 2 - 1024
    shared = always + (movable if fits else 0)
    resident = min(65536 // (THREADS * (-(-registers // 8) * 8)), gpu.shared // (shared + 1024), 2048 // THREADS)
    units, shuffles, accesses = clocks(operations, 64, gpu)
    pipe = max(units, key=lambda unit: units[unit])
    return Count(
        name=name,
        arch=arch,
        registers=registers,
        spilled=spilled,
        shared=shared,
        blocks=resident,
        issued=operations.total() / 64,
        shuffles=shuffles,
        shared_accesses=accesses,
        issue_clocks=max(units["issue"], units["special functions"]),
        pipe_clocks=units[pipe],
        pipe=pipe,
    )


def _innermost_with_exponentials(blocks: list[sass.Block], found: Sequence[sass.Loop]) -> list[sass.Loop]:
    chosen = []
    for loop in found:
        inner = _innermost_with_exponentials(blocks, loop.inner)
        own = sum(blocks[number].operations["MUFU.EX2"] for number in loop.body) >= 8
        chosen += inner or ([loop] if own else [])
    return chosen


def count_mamba(folder: Path, arch: str) -> dict[str, float]:
    """Return the instructions per state-step of mamba-ssm's kernels for up to 256 steps (bf16, gate, own B and C).

    A thread has 8 steps. An iteration of the outer loop does all states of a chunk of 256 steps, one after another.
    """
    with tempfile.TemporaryDirectory() as stub:
        macros = Path(stub) / "c10/cuda/impl/cuda_cmake_macros.h"  # a CPU build of torch lacks this generated file
        macros.parent.mkdir(parents=True)
        macros.write_text("#pragma once\n")
        torch_headers = Path(torch.__file__).parent / "include"
        source = folder / "csrc/selective_scan"
        options = ["-std=c++20", "--use_fast_math", "--expt-relaxed-constexpr", "--expt-extended-lambda", f"-I{source}"]
        options += [f"-I{stub}", f"-I{torch_headers}", f"-I{torch_headers / 'torch/csrc/api/include'}"]
        found = {}
        for way, file in (("forward", "selective_scan_fwd_bf16.cu"), ("backward", "selective_scan_bwd_bf16_real.cu")):
            text, _ = compile_cubin(source / file, arch, options)
            traits = "Li32ELi8ELi1ELb0ELb1ELb1ELb1E" if way == "forward" else "Li32ELi8ELb0ELb1ELb1ELb1ELb1E"
            (blocks,) = sass.kernels(text, f"{traits}N3c108BFloat16EfE").values()
            outer = max(sass.loops(blocks), key=lambda loop: len(loop.body))
            repeats = {inner.header: STATES for inner in _innermost_with_exponentials(blocks, outer.inner)}
            found[way] = sass.heaviest_path(blocks, outer, repeats).total() / (8 * STATES)
    return found
