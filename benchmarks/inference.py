"""Cost of inference.

Without models and sizes it compares our models in their fastest form with their rivals on 2 threads of this CPU, and prints one
JSON object last. With models or sizes it measures throughput against resolution: EfficientViM's Table E (by default its models);
its Figure A on a GPU, its Figure D on a CPU. The JSON object then has the milliseconds for an image, by model and size.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import efficientvim, vision_mamba
from benchmarks.rivals import THREADS
from pipeline.cli import guarded
from pipeline.errors import ConfigError
from pipeline.evaluate.speed import Cost, measure_inference
from pipeline.models import build_model
from pipeline.report.extras import Section, show_section, write_section
from pipeline.report.figures import draw, lines
from pipeline.report.tables import Table

# Table E of the supplement without the models that timm does not have: top-1 in percent as printed there, trained without a
# teacher (M4: 450 epochs).
TABLE_E = {
    "efficientvim_m4": 79.6,
    "timm/shvit_s4": 79.4,
    "timm/mobileone_s4": 79.4,
    "timm/fastvit_t12": 79.1,
    "timm/mobilevitv2_100": 78.1,
}


def main(arguments: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    return guarded(_run, arguments)


def _run(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.inference",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", help="default: those of EfficientViM's Table E")
    parser.add_argument("--sizes", type=int, nargs="+", help="pixels a side; default with models: 224")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument(
        "--rounds", type=int, help="rounds that count; default 5, and 20 for the comparison with rivals"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=4.0,
        help="end the comparison's rounds then (default 4)",
    )
    parser.add_argument("--deployed", action="store_true", help="fold batch norms and branches, as models are deployed")
    parser.add_argument("--out", type=Path, default=Path("runs/inference"))
    given = parser.parse_args(arguments)
    if not given.models and given.sizes is None:
        torch.set_num_threads(THREADS)
        mamba, rest = 40.0 * given.minutes, 20.0 * given.minutes
        with tempfile.TemporaryDirectory() as work, torch.inference_mode():
            rounds, folder = given.rounds or 20, Path(work)
            found = vision_mamba.headline(rounds, folder, mamba)
            found |= efficientvim.headline(rounds, given.batch, folder, rest)
        print(json.dumps({key: None if value is None else float(f"{value:.4g}") for key, value in found.items()}))
        return 0
    rounds = 5 if given.rounds is None else given.rounds
    costs = measure(given.models, given.sizes or [224], given.batch, rounds, deployed=given.deployed)
    print(show_section(write(costs, rounds, given.out, deployed=given.deployed)))
    print(json.dumps({f"{c.model}_{c.size}_ms": round(c.milliseconds, 3) for c in costs}))
    return 0


def run(
    names: Sequence[str], sizes: Sequence[int], batch: int, rounds: int, out: Path, *, deployed: bool = False
) -> Path:
    """Measure as `measure` does, write the section of a report as `write` does, and return its folder."""
    return write(measure(names, sizes, batch, rounds, deployed=deployed), rounds, out, deployed=deployed)


def measure(
    names: Sequence[str], sizes: Sequence[int], batch: int, rounds: int, *, deployed: bool = False
) -> list[Cost]:
    """Measure throughput against resolution.

    The models are randomly initialised, which costs the same as trained weights.

    Args:
        names: Models; empty for those of Table E.
        sizes: Pixels on a side of the images.
        batch: Images in a batch; it is halved where memory is short.
        rounds: Rounds that count.
        deployed: Measure the models with their batch norms and branches folded.

    Returns:
        The cost of each model at each size.

    Raises:
        ConfigError: A model is unknown, or `batch` or `rounds` is below 1.
    """
    if batch < 1 or rounds < 1:
        raise ConfigError(f"--batch {batch} --rounds {rounds}: each must be at least one")
    names = list(dict.fromkeys(names or TABLE_E))
    device = _device()
    costs: list[Cost] = []
    for size in sorted(set(sizes)):
        models = {name: build_model(name, image_size=size).eval() for name in names}
        one_size = dict.fromkeys(models, size)
        costs += measure_inference(models, one_size, batch=batch, rounds=rounds, device=device, deployed=deployed)
        print(
            f"{size} px: " + ", ".join(f"{c.model} {c.images_per_second:.1f}/s" for c in costs if c.size == size),
            flush=True,
        )
    return sorted(costs, key=lambda c: (names.index(c.model), c.size))


def write(costs: Sequence[Cost], rounds: int, out: Path, *, deployed: bool) -> Path:
    """Write a section of a report.

    Args:
        costs: What was measured, by model and then by size.
        rounds: Rounds that counted.
        out: Folder of the section.
        deployed: Whether batch norms and branches were folded.

    Returns:
        The section's folder.
    """
    names, sizes, device = list(dict.fromkeys(c.model for c in costs)), sorted({c.size for c in costs}), _device()
    table = Table(
        name="inference",
        title="Inference",
        header=["model", "pixels", "batch", "images/s", "ms/image", "parameters, M", "GMACs", "peak GiB", "top-1, reported"],
        rows=[
            [c.model, str(c.size), str(c.batch), f"{c.images_per_second:.1f}", f"{c.milliseconds:.2f}",
             f"{c.parameters / 1e6:.2f}", f"{c.gmacs:.3f}", "–" if c.memory_gib is None else f"{c.memory_gib:.2f}",
             f"{TABLE_E[c.model]:.1f}" if c.model in TABLE_E else "–"]
            for c in costs
        ],
        note=f"{place(device)}; fp32; {'batch norms and branches folded; ' if deployed else ''}the models take turns, medians of "
        f"{rounds} rounds after 2 of warm-up; a batch that does not fit is halved. GMACs are what papers print as FLOPs. "
        "Accuracies are those of EfficientViM's Table E (ImageNet-1k, percent, no teacher): reported, not measured here.",
    )  # fmt: skip
    series = {n: [([float(c.size) for c in costs if c.model == n], [c.images_per_second for c in costs if c.model == n])]
              for n in names}  # fmt: skip
    latency = {n: [(x, [1000 / v for v in y]) for x, y in curve] for n, curve in series.items()}
    figures = [
        draw(out / "figures", name, title, lines(curves, "pixels on a side", axis, logy=True, at=sizes))
        for name, title, curves, axis in (
            ("throughput", "Throughput against resolution", series, "images per second"),
            ("latency", "Time for one image against resolution", latency, "milliseconds"),
        )
    ]
    return write_section(out, Section("Efficiency of inference", [table], figures))


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def place(device: torch.device) -> str:
    """Name the device of a measurement for people."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
