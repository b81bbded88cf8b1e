"""Measure the speed of the CPU scan: `python -m benchmarks.scan` prints one JSON object on its last line.

All candidates compute the shape (8, 768, 197, 16) in fp32 with softplus and gate on 2 threads. They take turns in the
same rounds, so other work on the machine slows all of them together. The medians over the rounds are compared. The process keeps
the memory that it frees, as the stages do, which makes all of them faster. Rows in bf16 exist where the processor multiplies
bf16.
"""

import argparse
import ctypes
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.machine import multiplies_bf16
from benchmarks.turns import medians
from pipeline.cli import guarded
from pipeline.ops.choice import choose_scan
from pipeline.ops.native.build import load_library
from pipeline.ops.scan import selective_scan
from pipeline.train.host_memory import keep_freed

SHAPE = (8, 768, 197, 16)  # batch, channels, steps, states
BUDGET = 65.0  # seconds for each of the four measurements
# Suffix of the keys -> pixels on a side, images in a batch, whether under a bf16 autocast. The first two have as many tokens.
STEPS = {"": (224, 8, False), "_448": (448, 2, False), "_bf16": (224, 8, True)}


def plain_loop(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor) -> Tensor:
    """Compute the scan with the fastest plain torch loop we found: exponentials per step, `unbind`, sums as matmul."""
    dt = F.softplus(delta + bias[:, None])
    steps = zip(dt.unbind(-1), (dt * u).unbind(-1), B.unbind(-1), C.unbind(-1), strict=True)
    hidden = u.new_zeros(u.shape[0], u.shape[1], A.shape[1])
    outputs = []
    for dt_t, dtu_t, B_t, C_t in steps:
        hidden = torch.addcmul(dtu_t[:, :, None] * B_t[:, None], torch.exp(dt_t[:, :, None] * A), hidden)
        outputs.append((hidden @ C_t[:, :, None])[..., 0])
    return (torch.stack(outputs, -1) + D[:, None] * u) * F.silu(z)


def scan_inputs() -> list[Tensor]:
    """Return u, delta, A, B, C, D, z, bias with the ranges of a new Vim: step sizes about 1e-3 to 1e-1, A = -1..-N."""
    batch, channels, steps, states = SHAPE
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    wide, narrow = (batch, channels, steps), (batch, states, steps)
    A = -torch.arange(1.0, states + 1).repeat(channels, 1)
    return [
        normal(*wide),
        normal(*wide),
        A,
        normal(*narrow),
        normal(*narrow),
        normal(channels),
        normal(*wide),
        normal(channels) - 4,
    ]


def train(scan: Callable[..., Tensor], inputs: list[Tensor], gradient: Tensor) -> tuple[Tensor, ...]:
    """Run forward and backward and return the gradients of all inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    return torch.autograd.grad(scan(*leaves), leaves, gradient)


def relative_error(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> float:
    """Return the largest difference divided by the largest value, for the worst tensor."""
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, want, strict=True))


def peak_bytes(run: Callable[[], object]) -> int:
    """Return the largest sum of torch's live allocations during `run`, in bytes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        results = run()
    del results
    live = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def scan_rows(rounds: int) -> dict[str, float]:
    """Compare the operator with the plain loop and with its limit."""
    inputs = scan_inputs()
    gradient = torch.randn(SHAPE[:3], generator=torch.Generator().manual_seed(1))
    limit = load_library(sources=[Path(__file__).parent / "limit.cpp"]).limit
    limit.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 2
    u, delta, z = inputs[0], inputs[1], inputs[6]

    def least() -> None:
        o = torch.empty_like(u)
        limit(o.data_ptr(), u.data_ptr(), delta.data_ptr(), z.data_ptr(), u.numel(), SHAPE[3])

    def without_grad(scan: Callable[..., Tensor]) -> Callable[[], Tensor]:
        return torch.no_grad()(lambda: scan(*inputs))

    typical = medians(
        {
            "forward": without_grad(selective_scan),
            "limit": least,
            "loop": without_grad(plain_loop),
            "train": lambda: train(selective_scan, inputs, gradient),
            "loop train": lambda: train(plain_loop, inputs, gradient),
        },
        rounds,
        budget=BUDGET,
    )
    exact = [x.double() for x in inputs]
    got = selective_scan(*inputs), *train(selective_scan, inputs, gradient)
    want = plain_loop(*exact), *train(plain_loop, exact, gradient.double())
    io = sum(x.numel() * x.element_size() for x in (*inputs, u))  # the output is as large as u
    return {
        "forward_ms": typical["forward"] * 1e3,
        "train_ms": typical["train"] * 1e3,
        "forward_vs_reference": typical["loop"] / typical["forward"],
        "train_vs_reference": typical["loop train"] / typical["train"],
        "forward_vs_limit": typical["forward"] / typical["limit"],
        "relative_error": relative_error(got, want),
        "peak_bytes_vs_io": peak_bytes(lambda: train(selective_scan, inputs, gradient)) / io,
    }


def model_rows(rounds: int) -> dict[str, float]:
    """Compare a training step of Vim-Small with timm's ViT-Small with SDPA, with AdamW: each of `STEPS`.

    bf16 counts only where the processor multiplies it.
    """
    from pipeline.models import build_model
    from pipeline.ops.torchvision_cpu import allow_torchvision

    allow_torchvision()
    import timm

    rows = {}
    for suffix, (side, batch, bf16) in STEPS.items():
        if bf16 and not multiplies_bf16():
            continue
        torch.manual_seed(0)
        vit = timm.create_model("vit_small_patch16_224", img_size=side)
        models = {"vim": build_model("vim_small", image_size=side), "vit": vit}
        images, labels = torch.randn(batch, 3, side, side), torch.randint(1000, (batch,))
        steps = {name: training_step(model, images, labels, bf16=bf16) for name, model in models.items()}
        typical = medians(steps, rounds, budget=BUDGET)
        rows[f"vim_small_vs_vit_small{suffix}"] = typical["vim"] / typical["vit"]
        rows[f"vim_small_step_s{suffix}"] = typical["vim"]
        if not suffix:
            with profile(activities=[ProfilerActivity.CPU]) as recorded:
                steps["vim"]()
            print(recorded.key_averages().table(sort_by="self_cpu_time_total", row_limit=16, max_name_column_width=40))
    return rows


def training_step(model: nn.Module, images: Tensor, labels: Tensor, *, bf16: bool) -> Callable[[], None]:
    """Return a step of AdamW on the cross-entropy, under a bf16 autocast if asked for."""
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()

    return step


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark and return its exit code."""
    return guarded(_run, arguments)


def _run(words: list[str]) -> int:
    """Measure everything and print the rows as one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scan", default="auto", help="name of the implementation (see pipeline.ops.choice.SCANS)")
    parser.add_argument(
        "--rounds", type=int, default=40, help="rounds of the operator; the models run a quarter as many"
    )
    arguments = parser.parse_args(words)
    torch.set_num_threads(2)
    keep_freed()
    rows: dict[str, float | str] = {"scan": choose_scan(arguments.scan).name}
    rows |= scan_rows(arguments.rounds)
    rows |= model_rows(max(2, arguments.rounds // 4))
    print(json.dumps({key: value if isinstance(value, str) else float(f"{value:.4g}") for key, value in rows.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
