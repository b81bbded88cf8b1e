"""Study of stage 1: does ARM pretraining help, and which of its choices do?

Command: `python -m studies.arm [--seeds 0 1 2 3 4] [--jobs 2] [--images FOLDER]`

The images are the bundled digits, or a FOLDER with train/ and test/ that have one folder per class (read at 32 px). Each
seed has its own split with a tenth of the labels.

- Pretraining reads all training images and no label.
- The linear probe and the nearest neighbours learn from the labelled tenth and are evaluated on the validation subset.
- Fine-tuning learns from the labelled tenth. It is evaluated on the test set and on the validation subset, where the form
  of configs/distill/demo.yaml was chosen.

Every row is made of ordinary runs, so complete ones are reused. The command prints a table, then one JSON object.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

from studies.runs import evaluation, metrics, prepare, run

PRETRAINING = {
    "random": ["loop.steps=1", "optim.warmup_steps=0", "optim.lr=1e-12"],  # no step that moves a weight visibly
    "arm": [],
    "raster": ["model.order=raster"],
    "last-tap": ["decoder.taps=[4]"],
}
SHORT = {
    "arm": ["loop.steps=200", "linear_probe.neighbours=5"],
    "distill": ["loop.steps=150", "optim.lr=5e-3", "data.loader.sampling=uniform"],
}

_AS_PRETRAINED = ["model.directions=1", "model.order=cluster"]
_CLS = ["model.cls_token=middle", "model.pool=cls"]


class Place(NamedTuple):
    """Where the shards of the images and the runs on them are."""

    data: Path
    runs: Path

    def folder(self, seed: int, name: str) -> Path:
        """The folder of the runs of one row and seed."""
        return self.runs / f"seed{seed}-{name}"

    def split(self, seed: int) -> Path:
        """The split of one seed."""
        return self.data / f"study-arm-seed{seed}.json"


class Row(NamedTuple):
    """One line of the table."""

    name: str
    title: str
    pretraining: str  # a key of PRETRAINING
    fine_tuning: Sequence[str] = ()  # overrides of stage 2


ROWS = (
    Row("random", "random weights", "random"),
    Row("arm", "ARM: clusters, three taps; then rows, two directions, mean", "arm"),
    Row("last-tap", "  only the last tap", "last-tap"),
    Row("raster", "  raster order in both phases", "raster"),
    Row("cluster", "  cluster order in both phases", "arm", ["model.order=cluster"]),
    Row("four", "  four directions in fine-tuning", "arm", ["model.directions=4"]),
    Row("one", "  one direction in clusters, as pretrained", "arm", _AS_PRETRAINED),
    Row("random-one", "    from random weights", "random", _AS_PRETRAINED),
    Row("cls", "  a cls token in the middle instead of the mean", "arm", _CLS),
    Row("random-cls", "    from random weights", "random", _CLS),
)
# row -> the row that its gain is measured against; a row that is not named here is measured against "arm"
AGAINST = {"arm": "random", "one": "random-one", "cls": "random-cls"}
MEASURES = {"linear": "linear probe", "knn": "neighbours", "val": "fine-tuned, val", "top1": "fine-tuned, test"}


def main(arguments: list[str] | None = None) -> int:
    """Run what is missing and print the table.

    Args:
        arguments: Words of the command line; None reads those of this process.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(
        "python -m studies.arm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, with one thread each (default 1)")
    parser.add_argument(
        "--images",
        type=Path,
        metavar="FOLDER",
        help="has train/ and test/ with a folder per class (default: the digits)",
    )
    args = parser.parse_args(arguments)
    if args.images:
        name = f"study-arm-{args.images.resolve().name}"  # a folder called digits is not the bundled dataset
        place = Place(Path("data") / name, Path("runs") / name)
        for images in ("train", "test"):
            prepare("convert", "imagefolder", str(args.images / images), "--out", str(place.data / images))
    else:
        place = Place(Path("data/digits"), Path("runs/study-arm"))
        prepare("convert", "digits", "--out", str(place.data))
    for seed in args.seeds:
        split = ["split", str(place.data / "train"), "--out", str(place.split(seed)), "--seed", str(seed)]
        prepare(*split, "--labelled", "0.1", "--validation-per-class", "15")
    with ThreadPoolExecutor(args.jobs) as pool:
        for seed in args.seeds:
            for jobs in ([("arm", n, n) for n in PRETRAINING], [("distill", r.name, r.pretraining) for r in ROWS]):
                list(pool.map(lambda job, seed=seed: _run(place, seed, *job), jobs))
    found = {row.name: [_measure(place, seed, row) for seed in args.seeds] for row in ROWS}
    print(table(found))
    print(json.dumps({"study": "arm", "seeds": args.seeds, "percent": found}))
    return 0


def table(found: dict[str, list[dict[str, float]]]) -> str:
    """Format the results as text, in percent.

    Args:
        found: Row -> one mapping of measures per seed.

    Returns:
        Mean ± standard deviation over the seeds, and each row's gain over the row it varies, paired by seed.
    """
    lines = [f"{'':60s}" + "".join(f"{title:>18s}" for title in MEASURES.values()) + f"{'gain, test':>18s}"]
    for row in ROWS:
        cells = "".join(f"{_summary([seed[name] for seed in found[row.name]]):>18s}" for name in MEASURES)
        base = AGAINST.get(row.name, "arm")
        gain = ""
        if row.pretraining != "random":
            gain = _summary([a["top1"] - b["top1"] for a, b in zip(found[row.name], found[base], strict=True)], "+")
        lines.append(f"{row.title:60s}{cells}{gain:>18s}")
    return "\n".join(
        [
            *lines,
            f"{len(found['arm'])} seeds; a gain is over random weights in the same form if the table has that row, else over ARM",
        ]
    )


def _summary(values: list[float], sign: str = "") -> str:
    return f"{fmean(values):{sign}.2f} ± {stdev(values) if len(values) > 1 else 0:.2f}"


def _measure(place: Place, seed: int, row: Row) -> dict[str, float]:
    """The measures of one row and seed, in percent."""
    pretrained = metrics(place.folder(seed, row.pretraining) / "arm")[-1]
    fine_tuning = place.folder(seed, row.name) / "distill"
    return {
        "linear": pretrained["val/linear"],
        "knn": pretrained["val/knn"],
        "val": next(logged["val/top1"] for logged in reversed(metrics(fine_tuning)) if "val/top1" in logged),
        "top1": evaluation(fine_tuning)["student"]["top1"],
    }


def _run(place: Place, seed: int, stage: str, name: str, pretraining: str) -> None:
    start = "null" if pretraining == "random" else str(place.folder(seed, pretraining) / "arm" / "export")
    if stage == "arm":
        own = PRETRAINING[name]
    else:
        own = [
            f"init_from={start}",
            f"data.test={place.data / 'test'}",
            *next(r.fine_tuning for r in ROWS if r.name == name),
        ]
    values = [
        f"run.root={place.runs}",
        f"run.experiment=seed{seed}-{name}",
        f"run.seed={seed}",
        f"data.train={place.data / 'train'}",
        f"data.split={place.split(seed)}",
    ]
    run(stage, "demo", [*values, *SHORT[stage], *own], name=f"seed {seed}, {stage}, {name}")


if __name__ == "__main__":
    sys.exit(main())
