"""Time the scan on a GPU: our kernels against mamba-ssm's, side by side.

`make gpu-check` calls `measure`; `python -m benchmarks.gpu_scan` prints its JSON object.
"""

import json
import statistics
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch
from torch import Tensor

from pipeline.ops.choice import RIVALS, SCANS, Missing
from pipeline.ops.self_test import step_seconds

SHAPES = {
    "vim_small": (128, 768, 197, 16),
    "semivim_base": (64, 1536, 197, 16),
    "arm_base_pretraining": (256, 768, 128, 16),
}


def scan_inputs(batch: int, channels: int, steps: int, states: int, last: bool, dtype: torch.dtype) -> list[Tensor]:
    """Return u, delta, A, B, C, D, z, bias on the GPU, with channels last or steps last, and the ranges of a new Vim."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda", dtype=dtype)

    def wide() -> Tensor:
        return normal(batch, steps, channels).transpose(1, 2) if last else normal(batch, channels, steps)

    A = -torch.arange(1.0, states + 1, device="cuda").repeat(channels, 1)
    narrow = [normal(batch, states, steps) for _ in range(2)]
    D, bias = (normal(channels).float() for _ in range(2))
    return [wide(), wide(), A, *narrow, D, wide(), bias - 4]


def milliseconds(run: Callable[[], object], rounds: int) -> list[float]:
    """Return the time of each round, by events on the current stream."""
    times = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return times


def measure(rounds: int = 30) -> dict[str, float]:
    """Return the median milliseconds of forward and of forward and backward, for each shape and implementation.

    The implementations take turns. Each gets the layout that it is made for: ours channels last, mamba-ssm's steps last. One
    direction is timed, because mamba-ssm has no other. An implementation that is not installed is left out.
    """
    results: dict[str, float] = {}
    for shape_name, shape in SHAPES.items():
        runs: dict[str, Callable[[], object]] = {}
        for name in ("cuda", "mamba_ssm"):
            try:
                scan = SCANS[name](torch.device("cuda")).scan
            except Missing:
                continue
            leaves = [x.requires_grad_() for x in scan_inputs(*shape, name == "cuda", torch.bfloat16)]

            def forward(scan: Callable[..., Tensor] = scan, leaves: list[Tensor] = leaves) -> Tensor:
                with torch.no_grad():
                    return scan(*leaves)

            def train(scan: Callable[..., Tensor] = scan, leaves: list[Tensor] = leaves) -> object:
                out = scan(*leaves)
                return torch.autograd.grad(out, leaves, torch.ones_like(out))

            runs[f"{shape_name}_{name}_forward_ms"], runs[f"{shape_name}_{name}_train_ms"] = forward, train
        times: dict[str, list[float]] = {name: [] for name in runs}
        for run in runs.values():
            milliseconds(run, 3)  # compilation and allocation happen only once
        for _ in range(rounds):
            for name, run in runs.items():
                times[name] += milliseconds(run, 1)
        results |= {name: statistics.median(values) for name, values in times.items()}
    return results


def mixers(device: torch.device, names: Sequence[str] = RIVALS, **shape: int) -> dict[str, float]:
    """Return the median milliseconds of forward and backward of a mixer of two directions, for each implementation.

    Args:
        device: Where they compute.
        names: Keys of `SCANS`; one that is not installed is left out.
        **shape: As in `pipeline.ops.self_test.step_seconds`.
    """
    found = {}
    for name in names:
        with suppress(Missing):
            seconds = step_seconds(SCANS[name](device).whole_mixer, device, **shape)
            found[f"mixer_{name}_train_ms"] = 1e3 * seconds
    return found


if __name__ == "__main__":
    print(json.dumps(measure() | mixers(torch.device("cuda"))))
