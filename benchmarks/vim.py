"""Vision Mamba at inference on a CPU beside ViT: python -m benchmarks.vim prints one JSON object on its last line.

Vim-Small and timm's ViT-Small run in fp32 on 2 threads with random weights, in torch eager and in ONNX Runtime (extra `onnx`).
All forms take turns, and medians are compared. ViT counts in its fastest form. `onnx_error` is the largest relative error of
Vim-Small's ONNX file to eager.
"""

import argparse
import importlib.util
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.efficientvim import REST, THREADS, onnx_run
from benchmarks.turns import medians
from pipeline.cli import guarded
from pipeline.errors import ConfigError
from pipeline.models import build_model

SIZES = (224, 448, 896)
RIVALS = {"vim_small": "vim_small", "vit_small": "timm/vit_small_patch16_224"}
PER_SIZE = 60.0  # seconds


def forms(model: nn.Module, images: Tensor, name: str, folder: Path) -> dict[str, Callable[[], Any]]:
    """Return a run of each form of a model that this machine has."""
    found: dict[str, Callable[[], Any]] = {f"{name} eager": lambda: model(images)}
    if all(importlib.util.find_spec(package) for package in ("onnx", "onnxruntime")):
        found[f"{name} onnx"] = onnx_run(model, images, folder, name)
    return found


def one_size(size: int, batch: int, rounds: int, folder: Path) -> dict[str, float]:
    """Measure all forms at one size of the images, and return the keys of the JSON line with the suffix of the size."""
    torch.manual_seed(0)
    models = {name: build_model(known, image_size=size).eval() for name, known in RIVALS.items()}
    images = torch.randn(batch, 3, size, size)
    runs: dict[str, Callable[[], Any]] = {}
    for name, model in models.items():
        runs |= forms(model, images, f"{name}_{size}", folder)
    seconds = medians(runs, rounds, rest=REST, warm_up=2, budget=PER_SIZE)
    for name, value in seconds.items():
        print(f"{name:30s} {1e3 * value:9.1f} ms  {batch / value:7.2f} images/s", flush=True)
    eager, onnx = f"vim_small_{size} eager", f"vim_small_{size} onnx"
    vit = min(value for name, value in seconds.items() if name.startswith("vit"))
    rows = {f"vim_small_vs_vit_small_{size}": vit / seconds[eager], f"vim_small_ms_{size}": 1e3 * seconds[eager]}
    rows[f"vit_small_ms_{size}"] = 1e3 * vit
    if onnx in runs:
        wanted, got = models["vim_small"](images), torch.from_numpy(runs[onnx]()[0])
        rows[f"vim_small_onnx_vs_eager_{size}"] = seconds[eager] / seconds[onnx]
        rows[f"onnx_error_{size}"] = float((got - wanted).abs().max() / wanted.abs().max())
    return rows


@torch.inference_mode()
def main(arguments: Sequence[str]) -> int:
    """Run the benchmark and return its exit code."""
    return guarded(_run, arguments)


def _run(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.vim", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="pixels a side")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20)
    given = parser.parse_args(words)
    if given.batch < 1 or given.rounds < 1 or min(given.sizes) < 16:
        raise ConfigError("--batch and --rounds must be at least 1, --sizes at least 16")
    torch.set_num_threads(THREADS)
    rows: dict[str, float] = {"batch": given.batch}
    with tempfile.TemporaryDirectory() as folder:
        for size in given.sizes:
            rows |= one_size(size, given.batch, given.rounds, Path(folder))
    print(json.dumps({key: float(f"{value:.4g}") for key, value in rows.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
