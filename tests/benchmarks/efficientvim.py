"""How fast EfficientViM is on a CPU: python -m tests.benchmarks.efficientvim prints one JSON line last.

fp32, 2 threads, random weights with trained statistics. Every rival takes its turn in the same rounds and medians are
compared, so a machine with other work on it slows them together. timm's models are as its users run them: reparameterised.
"Fastest form" is the faster of torch eager (timm's in both memory layouts, ours fused and packed) and ONNX Runtime; without
onnxruntime (requirements-onnx.txt) the keys that need it are null. `fused_error` is that of the worst of our forms, over the
largest logit. `--sizes 224 512 1024` prints latencies by resolution (Table E, Figure A), at the largest batch that memory
allows; `--front` the speed-accuracy front (Figure B). The paper's EMO, EfficientMod and MobileFormer are not in timm and not
measured.
"""

import argparse
import importlib.util
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from pipeline.models import build_model
from pipeline.models.onnx_file import write_onnx
from pipeline.ops.torchvision_cpu import allow_torchvision

THREADS = 2
OURS = "efficientvim_m4 (ours)"
RIVALS = ("shvit_s4", "fastvit_t12", "mobileone_s4", "mobilevitv2_100")
# ImageNet-1k top-1 as reported by the papers (300 epochs for EfficientViM, no distillation), not measured here.
REPORTED = {
    "efficientvim_m1": 72.9,
    "efficientvim_m2": 75.4,
    "efficientvim_m3": 77.6,
    "efficientvim_m4": 79.4,
    "shvit_s1": 72.8,
    "shvit_s2": 75.2,
    "shvit_s3": 77.4,
    "shvit_s4": 79.4,
    "fastvit_t12": 79.1,
    "mobileone_s4": 79.4,
    "mobilevitv2_100": 78.1,
}
Run = Callable[[], Any]


def as_if_trained(model: nn.Module) -> nn.Module:
    """In eval mode, with batch norms that fusing must not ignore. Fresh ones of timm's SHViT scale whole branches by zero: its
    exporter would then keep one tensor of zeros for all of them, and the runtime never read 6 of its 17 million weights."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


def reparameterised(name: str) -> nn.Module:
    """timm's model as its users deploy it."""
    allow_torchvision()
    import timm
    from timm.utils.model import reparameterize_model

    return reparameterize_model(as_if_trained(timm.create_model(name))).eval()


def ours(name: str, image_size: int) -> nn.Module:
    torch.manual_seed(0)
    return as_if_trained(build_model(name, image_size=image_size))


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
    relative = absolute = 0.0
    with_onnx = all(importlib.util.find_spec(package) for package in ("onnx", "onnxruntime"))
    for variant, rival in (("m4", "shvit_s4"), ("m2", "shvit_s2")):
        model = ours(f"efficientvim_{variant}", 224)
        fused, packed = model.fuse(), model.fuse().pack()
        runs[f"{variant} packed"] = lambda packed=packed: packed(images)
        answers = [fused(images), packed(images)]
        for name in (f"efficientvim_{variant}", rival):
            theirs = reparameterised(name)
            runs |= eager_runs(theirs, images, name)
            if with_onnx:
                runs[f"{name} onnx"] = onnx_run(theirs, images, folder, name)
        if with_onnx:
            runs[f"{variant} onnx"] = onnx_run(fused, images, folder, variant)
            answers.append(torch.from_numpy(runs[f"{variant} onnx"]()[0]))
        want = model(images)
        error = max(float((answer - want).abs().max()) for answer in answers)
        absolute, relative = max(absolute, error), max(relative, error / float(want.abs().max()))
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
        "fused_error": relative,
        "fused_error_absolute": absolute,
    }


def limit_memory() -> None:
    """Let an allocation that this machine has no memory for fail, where Linux would promise it and kill the process later."""
    address_space = psutil.Process().memory_info().vms + psutil.virtual_memory().available
    resource.setrlimit(resource.RLIMIT_AS, (address_space, resource.getrlimit(resource.RLIMIT_AS)[1]))


def is_out_of_memory(error: BaseException) -> bool:
    """torch's allocator on a CPU and oneDNN say so with a plain RuntimeError."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or "allocate memory" in said or "bad_alloc" in said or "enough memory" in said


def largest_batch(run: Callable[[int], Any], batch: int) -> int:
    """The batch, halved for as long as memory is too small for it; 0 if not even one image fits."""
    while batch:
        try:
            run(batch)
            return batch
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            batch //= 2
    return 0


def milliseconds(models: dict[str, tuple[nn.Module, int]], rounds: int, batch: int) -> dict[str, float]:
    """An image of every (model, size), all taking turns, each with the largest batch that fits; what fits not is left out."""
    runs, numbers = {}, {}
    for name, (model, size) in models.items():
        numbers[name] = largest_batch(lambda n, m=model, s=size: m(torch.randn(n, 3, s, s)), batch)
        if numbers[name]:
            images = torch.randn(numbers[name], 3, size, size)
            runs[name] = lambda m=model, x=images: m(x)
    return {name: 1e3 * value / numbers[name] for name, value in medians(runs, rounds).items()}


def by_size(sizes: Sequence[int], rounds: int, batch: int) -> dict[str, dict[int, float]]:
    """Milliseconds an image of every model at every size: Table E's CPU column, and Figure A."""
    rows: dict[str, dict[int, float]] = {}
    for size in sizes:
        models = {OURS: (ours("efficientvim_m4", size).fuse().pack(), size)}
        models |= {name: (reparameterised(name), size) for name in ("efficientvim_m4", *RIVALS)}
        for name, value in milliseconds(models, rounds, batch).items():
            rows.setdefault(name, {})[size] = value
    print(f"{'ms an image':28s}" + "".join(f"{size:>10d}" for size in sizes))
    for name, row in rows.items():
        print(f"{name:28s}" + "".join(f"{row[size]:10.2f}" if size in row else f"{'-':>10s}" for size in sizes))
    return rows


def front(rounds: int, batch: int) -> dict[str, float]:
    """Images a second of every model of REPORTED at its own size, ours packed: Figure B. A star: none is faster and better."""
    allow_torchvision()
    import timm

    models = {}
    for name in REPORTED:
        if name.startswith("efficientvim"):
            size = 256 if name.endswith("m4") else 224
            models[name] = ours(name, size).fuse().pack(), size
        else:
            models[name] = reparameterised(name), int(timm.get_pretrained_cfg_value(name, "input_size")[-1])
    rates = {name: 1e3 / value for name, value in milliseconds(models, rounds, batch).items()}
    print(f"{'':3s}{'eager':25s}{'px':>6s}{'images/s':>10s}  top-1 as reported")
    for name, rate in sorted(rates.items(), key=lambda item: -item[1]):
        beaten = any(rates[n] > rate and REPORTED[n] > REPORTED[name] for n in rates)
        print(f"{' ' if beaten else '*':3s}{name:25s}{models[name][1]:6d}{rate:10.1f}{REPORTED[name]:10.1f}")
    return rates


def draw(path: Path, labels: tuple[str, str], points: dict[str, dict[float, float]]) -> None:
    """A PNG of a line (or a point) for each name."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for name, row in points.items():
        axes.plot(list(row), list(row.values()), marker="o", label=name)
    axes.set(xlabel=labels[0], ylabel=labels[1], xscale="log")
    axes.legend(fontsize="x-small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight")


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--sizes", type=int, nargs="*", default=[], help="pixels a side, for the table by resolution")
    parser.add_argument("--front", action="store_true", help="the table of speed and reported accuracy")
    parser.add_argument("--plots", type=Path, help="folder for a PNG of each of these tables")
    parser.add_argument("--profile", action="store_true", help="print where the packed M4 spends its time")
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as folder:
        result = headline(arguments.rounds, arguments.batch, Path(folder))
    if arguments.profile:
        packed, images = ours("efficientvim_m4", 224).fuse().pack(), torch.randn(arguments.batch, 3, 224, 224)
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            packed(images)
        print(recorded.key_averages().table(sort_by="self_cpu_time_total", row_limit=12, max_name_column_width=40))
    few = max(3, arguments.rounds // 5)
    if arguments.front:
        rates = front(few, arguments.batch)
        families = ("efficientvim", "shvit", "fastvit", "mobileone", "mobilevitv2")
        points = {f: {rates[n]: REPORTED[n] for n in rates if n.startswith(f)} for f in families}
        if arguments.plots:
            draw(arguments.plots / "front.png", ("images/s, CPU", "top-1 as reported"), points)
    if arguments.sizes:
        limit_memory()
        rows = by_size(arguments.sizes, few, arguments.batch)
        if arguments.plots:
            draw(arguments.plots / "sizes.png", ("pixels a side", "ms an image"), rows)
    print(json.dumps({k: None if v is None else float(f"{v:.4g}") for k, v in result.items()}))


if __name__ == "__main__":
    main()
