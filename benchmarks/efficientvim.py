"""Measure how fast EfficientViM is on a CPU: python -m benchmarks.efficientvim prints one JSON line last.

The models run in fp32 on 2 threads, with random weights and statistics as if trained. All rivals take turns in the same rounds
and medians are compared, so other work on the machine slows them together. timm's models are reparameterised, as its users run
them. The "fastest form" of a model is the faster of torch eager (timm's in both memory layouts, ours fused and packed) and
ONNX Runtime; without onnxruntime (extra `onnx`) the keys that need it are null. `fused_error` is the largest error
of our forms over the largest logit.

The table by resolution is that of benchmarks/inference.py, and the Pareto front that of benchmarks/pareto.py. The paper's EMO,
EfficientMod and MobileFormer are not in timm and are not measured.
"""

import argparse
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.rivals import THREADS, Run, medians, onnx_run
from benchmarks.turns import BUDGET
from pipeline.cli import guarded
from pipeline.models import build_model
from pipeline.models.efficientvim.fused import fuse
from pipeline.models.efficientvim.model import EfficientViM
from pipeline.models.efficientvim.packed import pack
from pipeline.ops.torchvision_cpu import allow_torchvision


def as_if_trained(model: nn.Module) -> nn.Module:
    """Put a model in eval mode and draw its batch norms as if trained, so that fusing has something to fold.

    Fresh batch norms of timm's SHViT scale whole branches by zero. The exporter would then keep one tensor of zeros for all of
    them, and the runtime would never read 6 of its 17 million weights.
    """
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


def reparameterised(name: str, *, fresh: bool = False) -> nn.Module:
    """Build timm's model as its users deploy it; `fresh` keeps the batch norms it was initialised with."""
    allow_torchvision()
    import timm
    from timm.utils.model import reparameterize_model

    model = timm.create_model(name).eval()
    return reparameterize_model(model if fresh else as_if_trained(model)).eval()


def ours(name: str, image_size: int) -> EfficientViM:
    """Build our model with random weights, for square images of `image_size` pixels on a side."""
    torch.manual_seed(0)
    model = as_if_trained(build_model(name, image_size=image_size))
    assert isinstance(model, EfficientViM)
    return model


def eager_runs(model: nn.Module, images: Tensor, name: str) -> dict[str, Run]:
    """Return runs of timm's model in the two memory layouts that a user can choose."""
    last = reparameterised(name).to(memory_format=torch.channels_last)
    seen = images.contiguous(memory_format=torch.channels_last)
    return {f"{name} eager": lambda: model(images), f"{name} eager, channels last": lambda: last(seen)}


def headline(rounds: int, batch: int, folder: Path, budget: float = BUDGET) -> dict[str, float | None]:
    """Measure the ratios of throughput at 224 pixels, with all models in turns.

    Args:
        rounds: Rounds that count.
        batch: Images in a batch.
        folder: Where ONNX files are written.
        budget: Seconds after which no further round begins.

    Returns:
        The keys of the JSON line; a ratio above 1 means that ours is faster.
    """
    images = torch.randn(batch, 3, 224, 224)
    runs: dict[str, Run] = {}
    relative = absolute = 0.0
    with_onnx = all(importlib.util.find_spec(package) for package in ("onnx", "onnxruntime"))
    for variant, rival in (("m4", "shvit_s4"), ("m2", "shvit_s2")):
        model = ours(f"efficientvim_{variant}", 224)
        fused, packed = fuse(model), pack(model)
        runs[f"{variant} packed"] = lambda packed=packed: packed(images)
        outputs = [fused(images), packed(images)]
        for name in (f"efficientvim_{variant}", rival):
            theirs = reparameterised(name)
            runs |= eager_runs(theirs, images, name)
            if with_onnx:
                runs[f"{name} onnx"] = onnx_run(theirs, images, folder, name)
        if with_onnx:
            runs[f"{variant} onnx"] = onnx_run(fused, images, folder, variant)
            outputs.append(torch.from_numpy(runs[f"{variant} onnx"]()[0]))
            runs[f"fresh {rival} onnx"] = onnx_run(reparameterised(rival, fresh=True), images, folder, f"fresh_{rival}")
        want = model(images)
        error = max(float((output - want).abs().max()) for output in outputs)
        absolute, relative = max(absolute, error), max(relative, error / float(want.abs().max()))
    seconds = medians(runs, rounds, budget)
    for name, value in sorted(seconds.items(), key=lambda item: item[1]):
        print(f"{name:40s} {1e3 * value:8.1f} ms  {batch / value:7.1f} images/s")

    def fastest(*names: str) -> float:
        return min(value for key, value in seconds.items() if key.startswith(names))

    return {
        "m4_eager_vs_timm_fused": seconds["efficientvim_m4 eager"] / seconds["m4 packed"],
        "m4_onnx_vs_timm_onnx": seconds["efficientvim_m4 onnx"] / seconds["m4 onnx"] if with_onnx else None,
        "m4_vs_shvit_s4": fastest("shvit_s4 ") / fastest("m4 "),
        "m4_vs_fresh_shvit_s4": fastest("fresh shvit_s4 ") / fastest("m4 ") if with_onnx else None,
        "m2_vs_shvit_s2": fastest("shvit_s2 ") / fastest("m2 "),
        "m4_packed_images_per_second": batch / seconds["m4 packed"],
        "fused_error": relative,
        "fused_error_absolute": absolute,
    }


def by_layer(packed: nn.Module, images: Tensor, rounds: int) -> None:
    """Print the median milliseconds of a call by kind of layer and stage; torch's profiler does not see compiled layers."""
    began: dict[str, float] = {}
    seconds: dict[str, list[float]] = {}

    def watch(name: str, module: nn.Module) -> None:
        module.register_forward_pre_hook(lambda *_: began.__setitem__(name, time.perf_counter()))
        module.register_forward_hook(lambda *_: seconds.setdefault(name, []).append(time.perf_counter() - began[name]))

    for name, module in packed.named_modules():
        parts = name.split(".")
        if name in ("", "stem", "head") or (len(parts) == 2 + (parts[0] == "stages") * 2 and parts[0] != "stem"):
            watch(name, module)
    for _ in range(rounds):
        packed(images)
    groups: dict[str, float] = {}
    for name, values in seconds.items():
        parts = name.split(".")
        group = f"{parts[0]} {parts[1]} {parts[3]}" if len(parts) == 4 else parts[0]
        groups[group] = groups.get(group, 0) + statistics.median(values)
    for group, value in groups.items():
        print(f"{group or 'the whole call':40s} {1e3 * value:8.1f} ms")


@torch.inference_mode()
def main(arguments: Sequence[str]) -> int:
    """Run the benchmark and return its exit code."""
    return guarded(_run, arguments)


def _run(words: list[str]) -> int:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--profile", action="store_true", help="print where the packed M4 spends its time")
    arguments = parser.parse_args(words)
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as folder:
        result = headline(arguments.rounds, arguments.batch, Path(folder))
    if arguments.profile:
        by_layer(pack(ours("efficientvim_m4", 224)), torch.randn(arguments.batch, 3, 224, 224), arguments.rounds)
    print(json.dumps({k: None if v is None else float(f"{v:.4g}") for k, v in result.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
