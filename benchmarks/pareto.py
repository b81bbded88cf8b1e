"""The Pareto front of speed and accuracy, as EfficientViM's Figure B draws it.

Throughput is measured here. Accuracy is ImageNet-1k top-1 in percent as papers report it for models trained without a teacher
for 300 epochs (EfficientViM's Tables C and E and its README, SHViT's README); no accuracy here is ours. The line joins the
EfficientViMs; what lies below and to the left of it is slower and less accurate.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from benchmarks.inference import place
from pipeline.cli import guarded
from pipeline.errors import ConfigError
from pipeline.evaluate.speed import Cost, measure_inference
from pipeline.models import build_model
from pipeline.report.extras import Section, show_section, write_section
from pipeline.report.figures import draw, pareto_front
from pipeline.report.tables import Table


class Reported(NamedTuple):
    """A model with the accuracy that a paper reports for it.

    Attributes:
        model: Name of the model.
        top1: Accuracy in percent.
        pixels: Pixels on a side of the images that it was evaluated on.
        fields: Fields of the model's config that the row changes.
    """

    model: str
    top1: float
    pixels: int
    fields: Mapping[str, Any] = MappingProxyType({})


# Row -> its model. The letters are the rows of Table C, whose base is M2. Its row C has the published size with NC-SSD and
# without fusion.
EFFICIENTVIMS = {
    "EfficientViM-M1": Reported("efficientvim_m1", 72.9, 224),
    "EfficientViM-M2": Reported("efficientvim_m2", 75.4, 224),
    "EfficientViM-M3": Reported("efficientvim_m3", 77.5, 224),
    "EfficientViM-M4": Reported("efficientvim_m4", 79.4, 256),
}
OTHERS = {
    "C: NC-SSD": Reported("efficientvim_m2", 76.2, 224, {"mixer": "ncssd", "fusion": "none"}),
    "D: attention": Reported("efficientvim_m2", 76.1, 224, {"mixer": "attention", "fusion": "none"}),
    "E: multi-head": Reported("efficientvim_m2", 75.5, 224, {"importance": "multihead"}),
    "F: one vector": Reported("efficientvim_m2", 75.2, 224, {"importance": "vector"}),
    "G: fuses maps": Reported("efficientvim_m2", 75.3, 224, {"fusion": "map"}),
    "H: no fusion": Reported("efficientvim_m2", 75.1, 224, {"fusion": "none"}),
    "I: states 9, 25, 49": Reported("efficientvim_m2", 75.4, 224, {"states": (9, 25, 49)}),
    "J: states 25, 25, 25": Reported("efficientvim_m2", 75.2, 224, {"states": (25, 25, 25)}),
    "SHViT-S1": Reported("timm/shvit_s1", 72.8, 224),
    "SHViT-S2": Reported("timm/shvit_s2", 75.2, 224),
    "SHViT-S3": Reported("timm/shvit_s3", 77.4, 224),
    "SHViT-S4": Reported("timm/shvit_s4", 79.4, 256),
    "FastViT-T12": Reported("timm/fastvit_t12", 79.1, 256),
    "MobileOne-S4": Reported("timm/mobileone_s4", 79.4, 224),
    "MobileViTV2-1.0": Reported("timm/mobilevitv2_100", 78.1, 256),
}


def main(arguments: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    return guarded(_run, arguments)


def _run(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pareto", description=__doc__)
    parser.add_argument("--rows", nargs="+", default=[], metavar="ROW", help="rows of the table (default: all)")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/pareto"))
    given = parser.parse_args(arguments)
    print(show_section(run(given.rows, given.batch, given.rounds, given.out)))
    return 0


def run(rows: Sequence[str], batch: int, rounds: int, out: Path) -> Path:
    """Measure models in turns and write a section of a report.

    Args:
        rows: Names of `EFFICIENTVIMS` and `OTHERS`; empty for all.
        batch: Images in a batch; it is halved where memory is short.
        rounds: Rounds that count.
        out: Folder of the section.

    Returns:
        The section's folder.

    Raises:
        ConfigError: A row is unknown, or `batch` or `rounds` is below 1.
    """
    known = EFFICIENTVIMS | OTHERS
    unknown = [row for row in rows if row not in known]
    if unknown or batch < 1 or rounds < 1:
        raise ConfigError(
            f"--rows {', '.join(unknown)}: known are {', '.join(known)}"
            if unknown
            else f"--batch {batch} --rounds {rounds}: each must be at least one"
        )
    chosen = {row: known[row] for row in rows or known}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = {row: build_model(r.model, image_size=r.pixels, **r.fields) for row, r in chosen.items()}
    sizes = {row: r.pixels for row, r in chosen.items()}
    measured = measure_inference(models, sizes, batch=batch, rounds=rounds, device=device, deployed=True)
    costs = {cost.model: cost for cost in measured}
    table = Table(
        name="pareto",
        title="Speed, and accuracy as reported",
        header=["model", "pixels", "top-1, reported", "images/s, here", "parameters, M", "GMACs"],
        rows=[_row(row, r, costs[row]) for row, r in chosen.items()],
        note="Accuracy: as the papers print it, for ImageNet-1k, 300 epochs, no teacher; not measured here. "
        f"Speed: {place(device)}, fp32, batch {batch}, batch norms and branches folded, the models take turns, medians of "
        f"{rounds} rounds. "
        "C to J are EfficientViM-M2 with one change.",
    )
    points = {row: (costs[row].images_per_second, r.top1) for row, r in chosen.items()}
    figure = draw(
        out / "figures",
        "pareto",
        "Speed here against accuracy as reported",
        pareto_front(
            points,
            joined=list(EFFICIENTVIMS),
            xlabel="images per second, measured here",
            ylabel="top-1, percent, as reported",
        ),
        note="The line joins the EfficientViMs; letters are the rows of the table.",
        size=(7.6, 4.2),
        wide=True,
    )
    return write_section(out, Section("Speed against accuracy", [table], [figure]))


def _row(name: str, reported: Reported, cost: Cost) -> list[str]:
    return [
        name,
        str(reported.pixels),
        f"{reported.top1:.1f}",
        f"{cost.images_per_second:.1f}",
        f"{cost.parameters / 1e6:.2f}",
        f"{cost.gmacs:.3f}",
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
