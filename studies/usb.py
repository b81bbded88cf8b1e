"""Run what USB runs on long-tailed CIFAR-10, CIFAR-100 and STL-10, and put our numbers beside the published ones.

    python -m studies.usb --dry                          check every config, and print steps, images and FLOPs; needs no data
    python -m studies.usb                                run all that is not complete, and fill docs/benchmarks.md
    python -m studies.usb --only stl10 --seeds 0         some rows, one seed
    python -m studies.usb --table                        only fill the table, from the runs that are complete

The benchmarks' files are converted by `python -m pipeline.data convert cifar|stl10` (docs/benchmarks.md). Each run takes
2^18 steps, so they need a GPU. The number of a row is the test accuracy of the exported network after the last step, in percent,
as the mean and the standard deviation over the seeds. USB reports the best accuracy on the test set during a run.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pipeline.config import load_config
from pipeline.errors import ConfigError
from pipeline.files import replace_text
from pipeline.models.family import FamilyConfig
from stages import SPECS
from stages.configs.semi import SemiConfig
from studies.runs import evaluation, prepare, run

PAGE = Path("docs/benchmarks.md")
BEGIN, END = "<!-- usb: begin -->", "<!-- usb: end -->"


@dataclass(frozen=True)
class Benchmark:
    """A long-tailed benchmark of USB.

    Attributes:
        key: Folder below `data`, and part of the configs' names.
        title: Its name in the table, with its sizes.
        num_classes: Classes.
        split: Options of `python -m pipeline.data split`.
    """

    key: str
    title: str
    num_classes: int
    split: tuple[str, ...]


class Row(NamedTuple):
    """A method on a benchmark: the config, what it overrides, and the published cell (USB's results, mean and deviation)."""

    benchmark: Benchmark
    name: str
    config: str
    values: tuple[str, ...]
    published: str

    @property
    def label(self) -> str:
        """What --only begins with."""
        return f"{self.benchmark.key}/{self.name}"


def _sizes(n_1: int, gamma_l: int, m_1: int = 0) -> tuple[str, ...]:
    labelled = ("--n-1", str(n_1), "--gamma-l", str(gamma_l))
    return (*labelled, "--m-1", str(m_1), "--gamma-u", str(gamma_l)) if m_1 else labelled


CIFAR10 = Benchmark("cifar10", "CIFAR10-LT, 1500/3000, imbalance 100", 10, _sizes(1500, 100, 3000))
CIFAR100 = Benchmark("cifar100", "CIFAR100-LT, 150/300, imbalance 10", 100, _sizes(150, 10, 300))
STL10 = Benchmark("stl10", "STL10-LT, 150, imbalance 10", 10, _sizes(150, 10))
STL10_20 = Benchmark("stl10", "STL10-LT, 150, imbalance 20", 10, _sizes(150, 20))
ABC = ("balanced_head={targets: hard}",)  # as USB's ABC learns

# Published: results/classic_cv_imb.csv of USB, three seeds.
ROWS = (
    Row(CIFAR10, "fixmatch", "usb_cifar10_fixmatch", (), "76.69 ± 0.78"),
    Row(CIFAR10, "fixmatch-abc", "usb_cifar10_fixmatch", ABC, "83.88 ± 0.27"),
    Row(CIFAR10, "semivim", "usb_cifar10_semivim", (), "-"),
    Row(CIFAR100, "fixmatch", "usb_cifar100_fixmatch", (), "57.76 ± 0.60"),
    Row(CIFAR100, "fixmatch-abc", "usb_cifar100_fixmatch", ABC, "59.71 ± 0.22"),
    Row(CIFAR100, "semivim", "usb_cifar100_semivim", (), "-"),
    Row(STL10, "fixmatch", "usb_stl10_fixmatch", (), "67.70 ± 2.02"),
    Row(STL10, "fixmatch-abc", "usb_stl10_fixmatch", ABC, "72.20 ± 1.20"),
    Row(STL10, "semivim", "usb_stl10_semivim", (), "-"),
    Row(STL10_20, "fixmatch-20", "usb_stl10_fixmatch", (), "56.90 ± 3.19"),
    Row(STL10_20, "fixmatch-abc-20", "usb_stl10_fixmatch", ABC, "67.68 ± 1.95"),
)
# Methods that this project does not have; the table shows their cells.
ELSEWHERE = (
    ("CIFAR10-LT, 1500/3000, imbalance 100", "remixmatch-cossl", "86.41 ± 0.13"),
    ("CIFAR100-LT, 150/300, imbalance 10", "remixmatch-cossl", "63.41 ± 0.57"),
    ("STL10-LT, 150, imbalance 10", "remixmatch-cossl", "69.25 ± 0.40"),
)


class Cost(NamedTuple):
    """What a run computes: optimizer steps, images of all streams, and FLOPs with the backward passes."""

    steps: int
    images: int
    flops: int


def cost(row: Row) -> Cost:
    """Check a row's config against the schema, and count its run; no data is read.

    Raises:
        ConfigError: The config does not fit the schema.
    """
    import torch

    from pipeline.models import build_from_config
    from pipeline.models.flops import forward_flops
    from stages.spec import Network

    config = _config(row, 0)

    def no_parent(role: str) -> FamilyConfig:
        raise ConfigError(f"{row.config} starts from {role}; USB's runs start from random weights")

    def forward(network: Network) -> int:
        with torch.device("meta"):
            return forward_flops(build_from_config(network.model), network.model.image_size)

    work = SPECS["semi"].workload(config, row.benchmark.num_classes, no_parent)
    samples = config.loop.steps * config.loop.global_batch
    return Cost(config.loop.steps, samples * work.images, samples * work.flops(forward))


def _values(row: Row, seed: int) -> list[str]:
    data = Path("data") / row.benchmark.key
    split = data / f"usb-{'-'.join(word.strip('-') for word in row.benchmark.split)}-{seed}.json"
    own = [f"run.experiment=usb-{row.benchmark.key}-{row.name}-{seed}", f"run.seed={seed}", f"data.split={split}"]
    return [*row.values, *own]


def _config(row: Row, seed: int) -> SemiConfig:
    return load_config(SemiConfig, Path(f"configs/semi/{row.config}.yaml"), _values(row, seed))


def _complete(row: Row, seed: int) -> float | None:
    """The test accuracy of a row's run with a seed; None while it is not complete."""
    folder = _config(row, seed).folder
    if not (folder / "export" / "model.json").is_file() or not (folder / "evaluation.json").is_file():
        return None
    return float(evaluation(folder)[_config(row, seed).export]["top1"])


def run_row(row: Row, seed: int) -> None:
    """Make the split of a seed and run the row, unless it is complete.

    Raises:
        SystemExit: A command failed; with its exit code.
    """
    folder, config = Path("data") / row.benchmark.key / "train", _config(row, seed)
    if not (folder / "manifest.json").is_file():
        kind = "stl10" if row.benchmark.key == "stl10" else "cifar"
        print(
            f"error: {folder} is no dataset; type: python -m pipeline.data convert {kind} DOWNLOADS --out {folder.parent}",
            file=sys.stderr,
        )
        raise SystemExit(3)
    assert config.data.split is not None
    prepare("split", str(folder), "--out", str(config.data.split), *row.benchmark.split, "--seed", str(seed))
    run("semi", row.config, _values(row, seed), name=f"{row.label}, seed {seed}")


def cell(accuracies: Sequence[float]) -> str:
    """Write accuracies as the mean and the standard deviation (of a population, as USB); `-` for none."""
    if not accuracies:
        return "-"
    spread = f" ± {statistics.pstdev(accuracies):.2f}" if len(accuracies) > 1 else " (one seed)"
    return f"{statistics.mean(accuracies):.2f}{spread}"


def table(rows: Sequence[Row], seeds: Sequence[int]) -> list[str]:
    """Return the lines of the table, in Markdown."""
    lines = ["| benchmark | method | published | ours |", "| --- | --- | --- | --- |"]
    for row in rows:
        found = [accuracy for seed in seeds if (accuracy := _complete(row, seed)) is not None]
        lines.append(f"| {row.benchmark.title} | {row.name} | {row.published} | {cell(found)} |")
    return lines + [f"| {title} | {name} | {published} | not in this project |" for title, name, published in ELSEWHERE]


def fill(page: Path, lines: Sequence[str]) -> None:
    """Replace the table of the page, which two comments enclose.

    Raises:
        ConfigError: The page lacks the comments.
    """
    text = page.read_text() if page.is_file() else ""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ConfigError(
            f"{page} lacks the comments {BEGIN} and {END}, between which the table is written; restore them"
        )
    replace_text(page, "\n".join([before + BEGIN, "", *lines, "", END + after]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    from pipeline.cli import guarded

    return guarded(_run, sys.argv[1:] if arguments is None else arguments)


def _run(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m studies.usb", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry", action="store_true", help="check every config and print what it costs; run nothing")
    parser.add_argument("--table", action="store_true", help="run nothing, only fill the table")
    parser.add_argument(
        "--only", default="", metavar="NAME", help="rows whose names begin so, for example cifar100/fixmatch"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="default: 0 1 2, as USB")
    given = parser.parse_args(arguments)
    rows = [row for row in ROWS if row.label.startswith(given.only)]
    if not rows:
        raise ConfigError(f"--only {given.only}: no row begins so; rows: {', '.join(row.label for row in ROWS)}")
    if given.dry:
        return _dry(rows)
    for row in rows if not given.table else ():
        for seed in given.seeds:
            if _complete(row, seed) is None:
                run_row(row, seed)
                fill(PAGE, table(ROWS, given.seeds))
    fill(PAGE, table(ROWS, given.seeds))
    print("\n".join(table(rows, given.seeds)))
    return 0


def _dry(rows: Sequence[Row]) -> int:
    total = {}
    print(f"{'row':<26}{'steps':>10}{'images':>14}{'EFLOP':>10}")
    for row in rows:
        found = cost(row)
        print(f"{row.label:<26}{found.steps:>10,}{found.images:>14,}{found.flops / 1e18:>10.3f}")
        total[row.label] = found._asdict()
    print(json.dumps(total))
    return 0


if __name__ == "__main__":
    sys.exit(main())
