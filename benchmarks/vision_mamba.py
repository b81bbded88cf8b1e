"""Inference of Vim-Small on a CPU beside timm's ViT-Small: the rows of `python -m benchmarks.inference` without models.

Ours runs eager and packed; ViT-Small runs eager and, where ONNX Runtime is installed, in it too, and its faster form counts. All
rivals of a size and a batch take turns in one run.
"""

import importlib.util
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.rivals import Run, medians, onnx_run
from benchmarks.turns import BUDGET
from pipeline.models import build_model
from pipeline.models.vision_mamba.model import VisionMamba
from pipeline.models.vision_mamba.packed import pack
from pipeline.ops.torchvision_cpu import allow_torchvision

# Pixels on a side -> images in a batch.
CASES = ((224, 1), (224, 8), (448, 1), (448, 8), (896, 1))


def runs_of(size: int, images: Tensor, folder: Path) -> tuple[dict[str, Run], float]:
    """Return the runs of a size by name, and the error of the packed form relative to the largest logit."""
    allow_torchvision()
    import timm

    torch.manual_seed(0)
    ours = build_model("vim_small", image_size=size).eval()
    assert isinstance(ours, VisionMamba)
    theirs = timm.create_model("vit_small_patch16_224", img_size=size).eval()
    packed = pack(ours)
    want = ours(images)
    error = float((packed(images) - want).abs().max() / want.abs().max())
    runs: dict[str, Run] = {"vim packed": lambda: packed(images), "vit eager": lambda: theirs(images)}
    if size == CASES[0][0]:
        runs["vim eager"] = lambda: ours(images)
    if all(importlib.util.find_spec(package) for package in ("onnx", "onnxruntime")):
        runs["vit onnx"] = onnx_run(theirs, images, folder, f"vit_{size}_{len(images)}")
        if size == CASES[0][0]:
            runs["vim onnx"] = onnx_run(ours, images, folder, f"vim_{size}_{len(images)}")
    return runs, error


def headline(rounds: int, folder: Path, budget: float = BUDGET) -> dict[str, float | None]:
    """Measure the ratios of speed; one above 1 means that ours is faster.

    Args:
        rounds: Rounds that count, for each size and batch.
        folder: Where ONNX files are written.
        budget: Seconds after which no further round begins, for all sizes and batches together.

    Returns:
        The keys of the JSON line. A size's own key is the smallest ratio of its batches.
    """
    found: dict[str, float | None] = {}
    worst, errors = {}, []
    for size, batch in CASES:
        runs, error = runs_of(size, torch.randn(batch, 3, size, size), folder)
        errors.append(error)
        seconds = medians(runs, rounds, budget / len(CASES))
        for name, value in seconds.items():
            print(
                f"{size} px, batch {batch}: {name:12s} {1e3 * value:9.1f} ms  {batch / value:7.2f} images/s", flush=True
            )
        fastest = min(value for name, value in seconds.items() if name.startswith("vit"))
        ratio = fastest / seconds["vim packed"]
        found[f"vim_small_packed_vs_vit_small_{size}_batch_{batch}"] = ratio
        worst[size] = min(ratio, worst.get(size, ratio))
        if "vim eager" in seconds and batch == 1:
            found["vim_small_packed_vs_eager"] = seconds["vim eager"] / seconds["vim packed"]
            onnx = seconds.get("vim onnx")
            found["vim_small_onnx_vs_eager"] = seconds["vim eager"] / onnx if onnx else None
    return (
        {f"vim_small_packed_vs_vit_small_{size}": ratio for size, ratio in worst.items()}
        | found
        | {"packed_error": max(errors)}
    )
