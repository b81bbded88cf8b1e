"""Does ARM pretraining pay, and do its parts: python -m studies.arm [--seeds 0 1 2 3 4] [--jobs 2] [--images FOLDER]

On the bundled digits, or on a FOLDER with train/ and test/, each a folder per class (at 32 px): one split a seed, a tenth
of the labels. Pretraining reads all training images and no label; the probes learn from the labelled tenth and are judged
on the validation part; fine-tuning on the labelled tenth is judged on the test set, and on the validation part, where the
form of configs/distill/demo.yaml was chosen. Every row is made of ordinary runs, so what is done already is reused.
Prints a table, then one JSON object.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

from studies.runs import prepare, run

PRETRAINING = {
    "random": ["loop.steps=1", "optim.warmup_steps=0", "optim.lr=1e-12"],  # no step that moves a weight visibly
    "arm": [],
    "raster": ["model.order=raster"],
    "last-tap": ["decoder.taps=[4]"],
}
SHORT = {
    "arm": ["loop.steps=200", "probe.neighbours=5"],
    "distill": ["loop.steps=150", "optim.lr=5e-3", "data.loader.sampling=uniform"],
}

_AS_PRETRAINED = ["model.directions=1", "model.order=cluster"]
_CLS = ["model.cls_token=middle", "model.pool=cls"]


class Place(NamedTuple):
    """Shards of the images, and the runs on them."""

    data: Path
    runs: Path

    def folder(self, seed: int, name: str) -> Path:
        return self.runs / f"seed{seed}-{name}"

    def split(self, seed: int) -> Path:
        return self.data / f"study-arm-seed{seed}.json"


class Row(NamedTuple):
    name: str
    title: str
    pretraining: str
    fine_tuning: Sequence[str] = ()


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
AGAINST = {"arm": "random", "one": "random-one", "cls": "random-cls"}  # the others against "arm"
JUDGED = {"linear": "linear probe", "knn": "neighbours", "val": "fine-tuned, val", "top1": "fine-tuned, test"}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m studies.arm", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument(
        "--images", type=Path, metavar="FOLDER", help="train/ and test/, a folder per class; none = digits"
    )
    args = parser.parse_args(arguments)
    if args.images:
        name = f"study-arm-{args.images.resolve().name}"  # a folder called digits is not the bundled dataset
        place = Place(Path("data") / name, Path("runs") / name)
        for part in ("train", "test"):
            prepare("convert", "imagefolder", str(args.images / part), "--out", str(place.data / part))
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
    found = {row.name: [_judge(place, seed, row) for seed in args.seeds] for row in ROWS}
    print(table(found))
    print(json.dumps({"study": "arm", "seeds": args.seeds, "percent": found}))
    return 0


def table(found: dict[str, list[dict[str, float]]]) -> str:
    """Percent, mean ± standard deviation over the seeds; and what a row gains over the one it varies, seed by seed."""
    lines = [f"{'':60s}" + "".join(f"{title:>18s}" for title in JUDGED.values()) + f"{'gain, test':>18s}"]
    for row in ROWS:
        cells = "".join(f"{_summary([seed[name] for seed in found[row.name]]):>18s}" for name in JUDGED)
        base = AGAINST.get(row.name, "arm")
        gain = ""
        if row.pretraining != "random":
            gain = _summary([a["top1"] - b["top1"] for a, b in zip(found[row.name], found[base], strict=True)], "+")
        lines.append(f"{row.title:60s}{cells}{gain:>18s}")
    return "\n".join(
        [
            *lines,
            f"{len(found['arm'])} seeds; gains over random weights in the same form where the table has them, else over ARM",
        ]
    )


def _summary(values: list[float], sign: str = "") -> str:
    return f"{fmean(values):{sign}.2f} ± {stdev(values) if len(values) > 1 else 0:.2f}"


def _judge(place: Place, seed: int, row: Row) -> dict[str, float]:
    rows = (place.folder(seed, row.pretraining) / "arm" / "metrics.jsonl").read_text().splitlines()
    probes = json.loads(rows[-1])
    fine_tuning = place.folder(seed, row.name) / "distill"
    validated = [json.loads(line) for line in (fine_tuning / "metrics.jsonl").read_text().splitlines()]
    fine_tuned = json.loads((fine_tuning / "evaluation.json").read_text())
    return {
        "linear": probes["val/linear"],
        "knn": probes["val/knn"],
        "val": next(row["val/top1"] for row in reversed(validated) if "val/top1" in row),
        "top1": fine_tuned["models"]["student"]["top1"],
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
