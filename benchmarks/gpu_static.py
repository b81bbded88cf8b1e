"""Count what the GPU kernels cost without a GPU: `python -m benchmarks.gpu_static` prints one JSON object last.

How to repeat the count by hand:

1. Compile a kernel: `nvcc -cubin -arch=sm_80 -O3 -std=c++17 -Xptxas -v` with the macros of `pipeline/ops/cuda/common.cuh`. ptxas
   tells registers and spilled bytes. Disassemble it: `nvdisasm -c`.
2. Find the loops that hold the exponentials of the recurrence, and count the instructions on the heaviest path through one
   iteration (`benchmarks/sass.py`). An iteration is a tile: a warp's thread has 64 state-steps of it. A *state-step* is one
   channel x one state x one time step. The backward has two loops, its two sweeps, which are added.
3. Divide. A multiprocessor (SM) issues 4 warp-instructions in a clock. A warp-instruction is 32 lanes, so 1000 state-steps at
   i instructions each take 1000 i / 32 / 4 clocks. The other units are slower, in lanes per clock and SM: special functions
   (MUFU: exponential, reciprocal) 16; fp32 64 on sm_80 and 128 on sm_90; integers 64; conversions 16 (64 on sm_90). The
   units for shared memory and shuffles move 32 words of 4 bytes in a clock, so a 16-byte access of a warp takes 4 clocks even
   if all lanes read one address. Units work side by side: the largest of these times is the bound.

The issue-bound clocks that the JSON names count issue slots and special functions. `pipe_clocks` also counts the other units,
and is what a kernel cannot beat. No bound counts latency, so real times are longer.

Bytes: the least is every input once and every result once. Above that come a second read of what left the L2 cache, and
partial sums (written, and read by the sum). A second read counts as a hit if all blocks that run at a time touch fewer bytes
in between than L2 holds. Loads and stores that carry the evict-first hint displace nothing.

Tools: nvcc and nvdisasm on the PATH, or from the packages nvidia-cuda-nvcc, nvidia-cuda-crt, nvidia-nvvm, nvidia-cuda-runtime and
nvidia-cuda-nvdisasm. With `--mamba FOLDER`, the unpacked source distribution of mamba-ssm, its kernels are counted too.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_counts import (
    MAMBA,
    STATES,
    TAPS,
    Count,
    compile_program,
    count_kernel,
    count_mamba,
    resources,
)
from pipeline.cli import guarded
from pipeline.config import load_config
from pipeline.files import replace_text
from pipeline.models.config import VisionMambaConfig
from pipeline.ops import reference
from pipeline.ops.cuda.counted import COUNTED, GPUS, TABLE, Gpu, scan_seconds, sources_hash, table
from pipeline.ops.cuda.emulator import Emulator
from pipeline.ops.cuda.library import MOST_TILES, CudaLibrary
from pipeline.ops.cuda.program import Program
from pipeline.ops.fused import Fused
from stages import SPECS


def scan_bytes(program: Program, steps: int, channels: int, gpu: Gpu, blocks: dict[str, int]) -> tuple[float, float]:
    """Return the bytes of forward and backward of the scans of one image, and the least possible."""
    wide, narrow, ways = (2 if program.wide else 4), (2 if program.narrow else 4), program.directions
    each = channels * steps * wide  # one (E, L) tensor
    states = 2 * STATES * steps * narrow * ways  # B and C
    inputs = each * (2 + ways) + states  # x, z, delta
    least = (inputs + each) + (inputs + each + each * (1 + 2 * ways) + states)  # o; g_o, g_z, g_u, g_delta, g_B, g_C
    tile = program.block_channels * steps * wide
    between = (
        gpu.multiprocessors * blocks["forward"] * tile
    )  # what the other direction finds in L2: x alone is unhinted
    more = each if ways == 2 and between > gpu.cache else 0
    sums = steps * ways * 2 * STATES * 4  # bytes of the partial sums of g_B and g_C that a block writes
    between = gpu.multiprocessors * blocks["backward"] * (tile * (3 + ways) + sums)
    more += (each * (3 + ways) + states) if between > gpu.cache else 0  # the second sweep
    tiles = -(-channels // program.block_channels)
    partials = -(-tiles // MOST_TILES) * sums * 2 + channels * ways * (STATES + 2) * 4 * 2
    return least + more + partials, least


def interpreter_error() -> float:
    """Return the largest relative error of the kernels' source, run on the CPU, over odd shapes, groups and directions."""
    fused, worst = Fused(CudaLibrary(Emulator())), 0.0
    generator = torch.Generator().manual_seed(0)
    for batch, channels, steps, states, groups, reverse in ((2, 6, 19, 3, 1, False), (1, 70, 47, 16, 2, True)):
        shapes = [(batch, channels, steps), (batch, channels, steps), (channels, states)]
        shapes += [(batch, groups, states, steps)] * 2 + [(channels,), (batch, channels, steps), (channels,)]
        inputs = [torch.randn(shape, generator=generator) for shape in shapes]
        inputs[2] = -inputs[2].exp()
        # The loss is linear in the outputs, with these weights.
        weights = [torch.randn(batch, channels, steps, generator=generator) for _ in range(2)]
        results = []
        for scan, dtype in ((fused.scan, torch.float32), (reference.selective_scan, torch.float64)):
            leaves = [x.to(dtype).requires_grad_() for x in inputs]
            out, ungated = scan(*leaves, reverse=reverse, return_ungated=True)
            gradients = torch.autograd.grad((out * weights[0] + ungated * weights[1]).sum(), leaves)
            results.append([out, ungated, *gradients])
        for got, want in zip(*results, strict=True):
            error = (got.double() - want).abs().max() / want.abs().max()
            worst = max(worst, float(error.detach().nan_to_num(nan=float("inf"))))
    return worst


def scans_of_configs() -> list[tuple[str, int, int, int, int, int, int]]:
    """Return (config, layers, calls of a layer, directions of a call, E, L, images) of the ImageNet configs that scan.

    The images are those of one of 8 GPUs in a step.
    """
    found = []
    for stage in ("arm", "distill"):
        for path in sorted((Path("configs") / stage).glob("imagenet_*.yaml")):
            config: Any = load_config(SPECS[stage].config, path)
            if not isinstance(config.model, VisionMambaConfig):
                continue
            model, (rows, columns) = config.model, config.model.grid_size
            ways = 1 if stage == "arm" else model.directions
            cluster = (model.cluster_size // model.patch_size) ** 2
            tokens = (
                rows * columns - cluster if stage == "arm" else rows * columns + 1
            )  # the last cluster is only predicted
            images = config.loop.global_batch // 8
            name = f"{stage}/{path.stem.removeprefix('imagenet_')}"
            found.append(
                (name, model.depth, max(1, ways // 2), min(ways, 2), model.expand * model.embed_dim, tokens, images)
            )
    return found


def print_kernels(counts: Sequence[Count]) -> None:
    """Print the table of kernels."""
    print(
        "kernel                      arch   regs spill  shared blocks | instr shfl  smem (per state-step) | clocks per 1000"
    )
    for c in counts:
        print(
            f"{c.name:27} {c.arch}  {c.registers:4} {c.spilled:5} {c.shared:7} {c.blocks:6} | {c.issued:5.1f} {c.shuffles:4.2f} "
            f"{c.shared_accesses:5.2f} {'':15} | issue {c.issue_clocks:4.0f}, all units {c.pipe_clocks:4.0f} ({c.pipe})"
        )


def main(arguments: Sequence[str]) -> int:
    """Count and print everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--mamba", type=Path, help="unpacked source distribution of mamba-ssm, whose kernels are counted too"
    )
    parser.add_argument("--write", action="store_true", help=f"write the counts to {TABLE.name}, which the plan reads")
    given = parser.parse_args(arguments)
    variants = {
        "bf16": {"wide": True, "narrow": True, "directions": 2, "taps": TAPS},
        "bf16, one direction": {"wide": True, "narrow": True, "taps": TAPS},
        "bf16, blend and ungated": {
            "wide": True, "narrow": True, "directions": 2, "taps": TAPS, "blend": True, "ungated": True,
        },
        "fp32": {"directions": 2, "taps": TAPS},
        "fp32, u given": {"ungated": True},
    }  # fmt: skip
    counts = [
        count_kernel(f"{way} {name}", Program(source=f"scan_{way}.cu", **values), f"scan_{way}", arch, 197)
        for arch in COUNTED
        for way in ("forward", "backward")
        for name, values in variants.items()
    ]
    print_kernels(counts)
    found: dict[str, Any] = {arch: {} for arch in COUNTED}
    for count in counts:
        if count.name in ("forward bf16", "backward bf16"):
            found[count.arch][count.name.split()[0]] = round(count.pipe_clocks, 1)
    if given.write:
        replace_text(TABLE, json.dumps(found | {"sources": sources_hash()}, indent=1) + "\n")
    conv_spills = 0
    for arch in COUNTED:
        program = Program(source="conv.cu", wide=True, directions=2, taps=TAPS)
        _, told = compile_program(program, arch)
        for kernel in ("conv_forward", "conv_backward"):
            registers, spilled = resources(told, kernel)
            conv_spills = max(conv_spills, spilled)
            print(f"{kernel:27} {arch}  {registers:4} {spilled:5}")
    mamba = {arch: count_mamba(given.mamba, arch) for arch in COUNTED} if given.mamba else dict.fromkeys(COUNTED, MAMBA)
    for arch, ways in mamba.items():
        text = ", ".join(f"{way} {i:.1f} = {1000 * i / 128:.0f} clocks per 1000" for way, i in ways.items())
        print(f"mamba-ssm on {arch}, instructions per state-step{'' if given.mamba else ' (counted before)'}: {text}")

    ratios = []
    print(
        "config                      arch   least ms per layer (compute, memory), per step on 8 GPUs; bytes against the least"
    )
    for name, layers, calls, ways, channels, steps, images in scans_of_configs():
        for arch, key in COUNTED.items():
            variant = "bf16" if ways == 2 else "bf16, one direction"
            of_way = {way: next(c for c in counts if (c.name, c.arch) == (f"{way} {variant}", arch)) for way in MAMBA}
            program = Program(source="scan_backward.cu", **variants[variant])
            blocks = {way: count.blocks for way, count in of_way.items()}
            used, least = scan_bytes(program, steps, channels, GPUS[key], blocks)
            ratios.append(used / least)
            sizes = {"directions": calls * ways, "channels": channels, "steps": steps, "states": STATES}
            compute = 1e3 * sum(scan_seconds(way, key, images=images, **sizes) for way in MAMBA)
            memory = images * calls * used / GPUS[key].bandwidth * 1e3
            print(
                f"{name:27} {arch}  {max(compute, memory):6.2f} ({compute:.2f}, {memory:.2f}), "
                f"{layers * max(compute, memory):7.1f}; {used / least:.3f}"
            )
    results: dict[str, float] = {}
    for arch in COUNTED:
        short = arch.replace("_", "")
        for way in MAMBA:
            count = next(c for c in counts if (c.name, c.arch) == (f"{way} bf16", arch))
            results[f"scan_{way}_clocks_per_1000_{short}"] = round(count.issue_clocks, 1)
            results[f"scan_{way}_all_units_clocks_per_1000_{short}"] = round(count.pipe_clocks, 1)
            results[f"mamba_{way}_clocks_per_1000_{short}"] = round(1000 * mamba[arch][way] / 128, 1)
            difference = abs(round(count.pipe_clocks, 1) / table()[arch][way] - 1)
            results["recorded_difference"] = round(max(difference, results.get("recorded_difference", 0.0)), 4)
    results["spills"] = max(conv_spills, *(c.spilled for c in counts))
    results["blocks_per_sm_least"] = min(c.blocks for c in counts)
    results["bytes_vs_least"] = round(max(ratios), 3)
    results["interpreter_error"] = interpreter_error()
    print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
