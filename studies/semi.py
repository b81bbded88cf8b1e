"""Study of stage 3: what helps where labels are few and classes are imbalanced?

Command: `python -m studies.semi [--seeds 0 1 2 3 4] [--jobs 2]`

There are two bundled datasets at imbalance 10: `digits` with a tenth of the labels, and `letters` (26 classes in colour)
with a fifth. Each seed has its own split. Every row is an ordinary run of stage 3 that starts from an ordinary run of
stage 2, with one thing changed. Complete runs are reused, so a study that was stopped continues.

The teacher's weights are evaluated once, on the test set. No threshold is chosen here. Tables go to standard output and,
as Markdown, CSV and LaTeX, to runs/study/tables. A column shows what the paper reports for the same comparison on
ImageNet, if it has one. The last line is one JSON object.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

from scipy.stats import t as student_t

from pipeline.report.tables import Table
from studies.paper import FOOTNOTES
from studies.paper import rows as paper_rows
from studies.runs import evaluation, prepare, run

RUNS, DATA = Path("runs/study"), Path("data")
DATASETS = {"digits": "0.1", "letters": "0.2"}  # name -> the share of each class that is labelled
METRICS = ("top1", "balanced", "head", "medium", "tail")
# A ViT with as many weights as the Vision Mamba: 156 and 154 thousand on letters. With the Vision Mamba's recipe it learns
# almost nothing from 395 images. Its learning rate and steps were the best on seed 0's validation subset (docs/study.md).
VIT = (
    "{name: timm/vit_tiny_patch16_224, image_size: 32, options: {patch_size: 8, embed_dim: 62, depth: 3, num_heads: 2}}"
)
BACKBONES: dict[str, dict[str, list[str]]] = {
    "vim": {"distill": [], "semi": []},
    "vit": {"distill": [f"model={VIT}", "optim.lr=1e-3", "loop.steps=1500"], "semi": ["optim.lr=1e-3"]},
}
_PLAIN = ["ema.mode=ema"]


class Row(NamedTuple):
    """One line of the tables."""

    name: str
    title: str
    backbone: str  # a key of BACKBONES
    values: Sequence[str]  # what differs from configs/semi/study.yaml
    against: str | None  # name of the row that its gain is measured against


ROWS = (
    Row("supervised", "supervised only", "vim", [*_PLAIN, "pseudo.weight=0"], None),
    Row("supervised-guarded", "supervised only, guarded LyapEMA", "vim", ["pseudo.weight=0"], "supervised"),
    Row("fixmatch", "FixMatch", "vim", [*_PLAIN, "pseudo.labeller=student"], "supervised"),
    Row("ema", "plain EMA teacher", "vim", _PLAIN, "supervised"),
    Row("lyap", "LyapEMA", "vim", ["ema.mode=lyap"], "ema"),
    Row("guarded", "guarded LyapEMA", "vim", [], "ema"),
    Row("guarded-pull", "guarded LyapEMA, pull 0.001", "vim", ["ema.pull=0.001"], "guarded"),
    Row("ssmixup", "guarded LyapEMA, SSMixup (nu learned)", "vim", ["ssmixup={}"], "guarded"),
    Row("ssmixup-fixed", "guarded LyapEMA, SSMixup (nu 1)", "vim", ["ssmixup={nu: 1.0}"], "guarded"),
    Row("pseudo-mixup", "guarded LyapEMA, pseudo-mixup", "vim", ["mixup={pseudo: true}"], "guarded"),
    Row("aligned", "guarded LyapEMA, aligned to uniform", "vim", ["pseudo.alignment=uniform"], "guarded"),
    Row(
        "balanced", "guarded LyapEMA, class-balanced thresholds", "vim", ["pseudo.thresholds=class_balanced"], "guarded"
    ),
    Row("vit-supervised", "ViT, supervised only", "vit", [*_PLAIN, "pseudo.weight=0"], "supervised"),
    Row("vit-ema", "ViT, plain EMA teacher", "vit", _PLAIN, "ema"),
    Row("vit-guarded", "ViT, guarded LyapEMA", "vit", [], "guarded"),
)

# Row -> the nearest row of the paper: imbalance 10, a tenth of the labels, Small. REPORTED_GAINS: row -> the two rows of the
# paper whose difference is the gain.
_VIM, _VIT = "T4-semivim-small-IF10-10pct", "T4-semivit-small-IF10-10pct"
REPORTED = {
    "ema": f"{_VIM}-ema",
    "lyap": f"{_VIM}-lyapema",
    "guarded": f"{_VIM}-lyapema",
    "vit-ema": f"{_VIT}-ema",
    "vit-guarded": f"{_VIT}-lyapema",
}
REPORTED_GAINS = {
    "lyap": (f"{_VIM}-lyapema", f"{_VIM}-ema"),
    "guarded": (f"{_VIM}-lyapema", f"{_VIM}-ema"),
    "ssmixup": ("T1-confidence-10pct", "T1-none-10pct"),
    "vit-ema": (f"{_VIT}-ema", f"{_VIM}-ema"),
    "vit-guarded": (f"{_VIT}-lyapema", f"{_VIM}-lyapema"),
}
PAPER = {row.name: row for row in paper_rows()}


def main(arguments: list[str] | None = None) -> int:
    """Run what is missing, print the tables and write them.

    Args:
        arguments: Words of the command line; None reads those of this process.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(
        "python -m studies.semi", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--datasets", nargs="+", choices=DATASETS, default=list(DATASETS))
    parser.add_argument("--rows", nargs="+", choices=[row.name for row in ROWS], default=[row.name for row in ROWS])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, with one thread each (default 1)")
    args = parser.parse_args(arguments)
    rows = [row for row in ROWS if row.name in args.rows]
    summary = {}
    for dataset in args.datasets:
        summary[dataset] = found = _runs(dataset, rows, args.seeds, args.jobs)
        for made in (means(dataset, rows, found), gains(dataset, rows, found)):
            if made.rows:  # with --rows, the row to compare with may be absent
                made.write(RUNS / "tables")
                print(f"\n{made.title}\n\n{made.markdown()}", flush=True)
    print(json.dumps({"study": "semi", "seeds": args.seeds, "rows": [row.name for row in rows], "percent": summary}))
    return 0


def _runs(dataset: str, rows: Sequence[Row], seeds: Sequence[int], jobs: int) -> dict[str, list[dict[str, float]]]:
    """Run what is missing on a dataset; row -> metrics of each seed."""
    prepare("convert", dataset, "--out", str(DATA / dataset))
    for seed in seeds:
        split = ["split", str(DATA / dataset / "train"), "--out", str(_split(dataset, seed)), "--seed", str(seed)]
        prepare(*split, *f"--imbalance 10 --labelled {DATASETS[dataset]} --validation-per-class 10".split())
    backbones = sorted({row.backbone for row in rows})
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda job: _stage_2(dataset, *job), [(s, b) for s in seeds for b in backbones]))
        list(pool.map(lambda job: _stage_3(dataset, *job), [(s, row) for s in seeds for row in rows]))
    return {row.name: [_measure(dataset, seed, row) for seed in seeds] for row in rows}


def means(dataset: str, rows: Sequence[Row], found: dict[str, list[dict[str, float]]]) -> Table:
    """Percent on the test set.

    Args:
        dataset: Name of the dataset.
        rows: Rows of the table, in order.
        found: Row -> metrics of each seed.

    Returns:
        Mean and 95 % interval over the seeds.
    """
    cells = [
        [row.title, *(_interval([seed[m] for seed in found[row.name]]) for m in METRICS), reported(row.name)]
        for row in rows
    ]
    return Table(
        name=f"{dataset}-means",
        title=f"{dataset}: percent on the test set, mean and 95 % interval over {len(found[rows[0].name])} seeds",
        header=["", *METRICS, "reported"],
        rows=cells,
        note=_footnotes([REPORTED[row.name] for row in rows if row.name in REPORTED]),
    )


def gains(dataset: str, rows: Sequence[Row], found: dict[str, list[dict[str, float]]]) -> Table:
    """Points that a row gains over the row it is compared with.

    Args:
        dataset: Name of the dataset.
        rows: Rows of the table, in order; a row whose other row was not run is left out.
        found: Row -> metrics of each seed.

    Returns:
        Mean and 95 % interval of the differences, paired by seed.
    """
    cells = []
    for row in rows:
        if row.against not in found:
            continue
        pairs = list(zip(found[row.name], found[row.against], strict=True))
        ours = [_interval([a[m] - b[m] for a, b in pairs], "+") for m in METRICS]
        cells.append([row.title, _title(row.against), *ours, reported_gain(row.name)])
    return Table(
        name=f"{dataset}-gains",
        title=f"{dataset}: points gained, paired by seed, mean and 95 % interval",
        header=["", "over", *METRICS, "reported"],
        rows=cells,
        note=_footnotes([name for row in rows if row.against in found for name in REPORTED_GAINS.get(row.name, ())]),
    )


def reported(row: str) -> str:
    """Top-1/head/tail of the paper's nearest row, with its footnotes; empty if there is none."""
    if row not in REPORTED:
        return ""
    told = PAPER[REPORTED[row]]
    return " ".join([told.reported, *_marks(told.notes)])


def reported_gain(row: str) -> str:
    """The gain by the paper's numbers, top-1/head/tail or top-1 alone; empty if the paper has no such comparison."""
    if row not in REPORTED_GAINS:
        return ""
    mine, other = (PAPER[name] for name in REPORTED_GAINS[row])
    pairs = zip(mine.reported.split("/"), other.reported.split("/"), strict=True)
    gained = "/".join(f"{float(a) - float(b):+.2f}" for a, b in pairs)
    return " ".join([gained, *_marks(mine.notes + other.notes)])


def _marks(notes: str) -> list[str]:
    return [f"[{', '.join(sorted(set(notes)))}]"] if notes else []


def _footnotes(names: Sequence[str]) -> str:
    if not names:
        return ""
    used = sorted({note for name in names for note in PAPER[name].notes})
    what = "reported: the paper's top-1/head/tail, one number without seeds, on ImageNet at imbalance 10, 10 % of the labels"
    mixing = "; for SSMixup, its top-1 on ImageNet-1k without imbalance" if "T1-none-10pct" in names else ""
    whose = " (Small; LyapEMA there has no guard, and Semi-ViM's rows do not say whether SSMixup is on)"
    return what + whose + mixing + "".join(f"; [{note}] {FOOTNOTES[note]}" for note in used)


def _title(name: str) -> str:
    return next(row.title for row in ROWS if row.name == name)


def _interval(values: list[float], sign: str = "") -> str:
    """Mean and half of Student's 95 % interval; the mean alone for one seed."""
    mean = f"{fmean(values):{sign}.1f}"
    if len(values) < 2:
        return mean
    half = student_t.ppf(0.975, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return f"{mean} ± {half:.1f}"


def _measure(dataset: str, seed: int, row: Row) -> dict[str, float]:
    teacher = evaluation(_folder(dataset, seed, row.name) / "semi")["teacher"]
    return {name: teacher[name] for name in METRICS}


def _stage_2(dataset: str, seed: int, backbone: str) -> None:
    _run(dataset, seed, "distill", backbone, BACKBONES[backbone]["distill"])


def _stage_3(dataset: str, seed: int, row: Row) -> None:
    parent = _folder(dataset, seed, row.backbone) / "distill" / "export"
    _run(dataset, seed, "semi", row.name, [f"init_from={parent}", *BACKBONES[row.backbone]["semi"], *row.values])


def _run(dataset: str, seed: int, stage: str, name: str, own: Sequence[str]) -> None:
    folder = _folder(dataset, seed, name)
    where = [f"data.{images}={DATA / dataset / images}" for images in ("train", "test")]
    values = [f"run.root={RUNS}", f"run.experiment={folder.name}", f"run.seed={seed}", *where]
    values.append(f"data.split={_split(dataset, seed)}")
    run(stage, "study", [*values, *own], name=f"{dataset}, seed {seed}, {stage}, {name}")


def _folder(dataset: str, seed: int, name: str) -> Path:
    return RUNS / f"{dataset}-seed{seed}-{name}"


def _split(dataset: str, seed: int) -> Path:
    return DATA / dataset / f"study-seed{seed}.json"


if __name__ == "__main__":
    sys.exit(main())
