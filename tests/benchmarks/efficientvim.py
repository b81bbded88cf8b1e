"""How fast EfficientViM is on a CPU: python -m tests.benchmarks.efficientvim prints one JSON line last.

fp32, 2 threads, random weights with trained statistics' shapes. Every rival takes its turn in the same rounds and medians are
compared, so a machine with other work on it slows them together. timm's models are as its users run them: reparameterised.
"Fastest form" is the faster of torch eager (timm's in both memory layouts, ours fused and packed) and ONNX Runtime; without
onnxruntime (requirements-onnx.txt) the keys that need it are null. `--sizes 224 512 1024` prints latencies by resolution (Table
E, Figure A), at the largest batch that memory allows; the paper's EMO, EfficientMod and MobileFormer are not in timm and not
measured.
"""

import argparse
import importlib.util
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from pipeline.models import build_model
from pipeline.models.onnx_file import write_onnx
from pipeline.ops.torchvision_cpu import allow_torchvision

THREADS = 2
RIVALS = ("shvit_s4", "fastvit_t12", "mobileone_s4", "mobilevitv2_100")
Run = Callable[[], Any]


def reparameterised(name: str) -> nn.Module:
    """timm's model as its users deploy it."""
    allow_torchvision()
    import timm
    from timm.utils.model import reparameterize_model

    return reparameterize_model(timm.create_model(name).eval()).eval()


def trained_like(name: str, image_size: int) -> nn.Module:
    """Our model with statistics that fusing must not ignore."""
    torch.manual_seed(0)
    model = build_model(name, image_size=image_size)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    return model.eval()


def medians(rivals: dict[str, Run], rounds: int) -> dict[str, float]:
    """Median seconds over `rounds` of each rival, all of them taking turns."""
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for run in rivals.values():
        run()
        run()  # what is built, chosen or allocated once
    for _ in range(rounds):
        for name, run in rivals.items():
            begin = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}


def onnx_run(model: nn.Module, images: Tensor, folder: Path, name: str) -> Run:
    """The model in ONNX Runtime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    path = write_onnx(model, folder / f"{name}.onnx", tuple(images.shape[-2:]))
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {"images": images.numpy()}
    return lambda: session.run(None, feed)


def eager_runs(model: nn.Module, images: Tensor, name: str) -> dict[str, Run]:
    """timm's model in the two memory layouts a user has."""
    last = reparameterised(name).to(memory_format=torch.channels_last)
    seen = images.contiguous(memory_format=torch.channels_last)
    return {f"{name} eager": lambda: model(images), f"{name} eager, channels last": lambda: last(seen)}


def headline(rounds: int, batch: int, folder: Path) -> dict[str, float | None]:
    """The ratios of throughput, at 224 px, in one interleaved run."""
    images = torch.randn(batch, 3, 224, 224)
    runs: dict[str, Run] = {}
    error = 0.0
    with_onnx = all(importlib.util.find_spec(package) for package in ("onnx", "onnxruntime"))
    for variant, rival in (("m4", "shvit_s4"), ("m2", "shvit_s2")):
        ours = trained_like(f"efficientvim_{variant}", 224)
        fused, packed = ours.fuse(), ours.fuse().pack()
        want = ours(images[:4])
        error = max(error, *(float((model(images[:4]) - want).abs().max()) for model in (fused, packed)))
        runs[f"{variant} packed"] = lambda packed=packed: packed(images)
        for name in (f"efficientvim_{variant}", rival):
            model = reparameterised(name)
            runs |= eager_runs(model, images, name)
            if with_onnx:
                runs[f"{name} onnx"] = onnx_run(model, images, folder, name)
        if with_onnx:
            runs[f"{variant} onnx"] = onnx_run(fused, images, folder, variant)
    seconds = medians(runs, rounds)
    for name, value in sorted(seconds.items(), key=lambda item: item[1]):
        print(f"{name:40s} {1e3 * value:8.1f} ms  {batch / value:7.1f} images/s")

    def fastest(*names: str) -> float:
        return min(value for key, value in seconds.items() if key.startswith(names))

    return {
        "m4_eager_vs_timm_fused": seconds["efficientvim_m4 eager"] / seconds["m4 packed"],
        "m4_onnx_vs_timm_onnx": seconds["efficientvim_m4 onnx"] / seconds["m4 onnx"] if with_onnx else None,
        "m4_vs_shvit_s4": fastest("shvit_s4 ") / fastest("m4 "),
        "m2_vs_shvit_s2": fastest("shvit_s2 ") / fastest("m2 "),
        "m4_packed_images_per_second": batch / seconds["m4 packed"],
        "fused_error": error,
    }


def largest_batch(run: Callable[[int], Any], batch: int) -> int:
    """The batch, halved for as long as memory is too small for it."""
    while batch > 1:
        try:
            run(batch)
            return batch
        except (RuntimeError, MemoryError):  # torch says so with a RuntimeError on a CPU
            batch //= 2
    return batch


def table(sizes: Sequence[int], rounds: int, batch: int, plot: Path | None) -> dict[str, dict[int, float]]:
    """Milliseconds an image of every model at every size: Table E's CPU column, and Figure A as rows (and a plot)."""
    rows: dict[str, dict[int, float]] = {}
    for size in sizes:
        models = {"efficientvim_m4 (ours)": trained_like("efficientvim_m4", size).fuse().pack()}
        models |= {name: reparameterised(name) for name in ("efficientvim_m4", *RIVALS)}
        for name, model in models.items():
            number = largest_batch(lambda n, model=model, size=size: model(torch.randn(n, 3, size, size)), batch)
            images = torch.randn(number, 3, size, size)
            rows.setdefault(name, {})[size] = (
                1e3 * medians({name: lambda m=model, x=images: m(x)}, rounds)[name] / number
            )
    print(f"{'ms an image':28s}" + "".join(f"{size:>10d}" for size in sizes))
    for name, row in rows.items():
        print(f"{name:28s}" + "".join(f"{row[size]:10.2f}" for size in sizes))
    if plot is not None:
        draw(rows, plot)
    return rows


def draw(rows: dict[str, dict[int, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for name, row in rows.items():
        axes.loglog(list(row), list(row.values()), marker="o", label=name)
    axes.set(xlabel="pixels a side", ylabel="ms an image")
    axes.legend()
    figure.savefig(path, bbox_inches="tight")


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--sizes", type=int, nargs="*", default=[], help="pixels a side, for the table by resolution")
    parser.add_argument("--plot", type=Path, help="a PNG of that table")
    parser.add_argument("--profile", action="store_true", help="print where the packed M4 spends its time")
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as folder:
        result = headline(arguments.rounds, arguments.batch, Path(folder))
    if arguments.profile:
        packed, images = trained_like("efficientvim_m4", 224).fuse().pack(), torch.randn(arguments.batch, 3, 224, 224)
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            packed(images)
        print(recorded.key_averages().table(sort_by="self_cpu_time_total", row_limit=12, max_name_column_width=40))
    if arguments.sizes:
        table(arguments.sizes, max(3, arguments.rounds // 5), arguments.batch, arguments.plot)
    print(json.dumps({k: None if v is None else float(f"{v:.4g}") for k, v in result.items()}))


if __name__ == "__main__":
    main()
