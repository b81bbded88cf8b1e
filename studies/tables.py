"""Run any row of Semi-ViM's tables with one command, and show our number beside the reported one.

    python -m studies.tables                              list all rows, with the results so far
    python -m studies.tables T1-none-10pct --nproc 8      run one: split, stages 1 to 3 (ImageNet, on a cluster)
    python -m studies.tables T3-10pct --nproc 8           run all rows whose names begin so: the sweep of tau
    python -m studies.tables T3-10pct --dataset letters             the same on a bundled dataset, on this machine
    python -m studies.tables T3-10pct --dataset letters --print     only print the commands

The rows are those of Tables 1 to 4 of the supplement and of the README's table. They share runs: a model has one stage 1,
and one stage 2 for each split. Complete runs are reused. Tau is chosen on the validation subset, and the chosen row is
marked; test numbers of the other rows decide nothing. Reported numbers are single values without seeds, and no test
compares ours with them.

A bundled dataset has no stage 1 and uses configs/{distill,semi}/study.yaml. It shows that a row runs, not what it gives.
ImageNet needs data/imagenet (docs/data.md), ImageNet-LT also its list there, and Semi-ViT its weights in weights/
(`studies/paper.py`).
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.report.tables import Table
from studies.paper import FOOTNOTES, LYAPEMA, PLAIN_EMA, Row, pretraining, recipe, rows
from studies.runs import evaluation, metrics
from studies.semi import BACKBONES

RUNS = Path("runs")
LT_LIST = "data/imagenet/ImageNet_LT_train.txt"
# Bundled datasets. Family -> overrides of stage 2 and of stage 3: the study's Vision Mamba or ViT, or a residual network,
# and what makes the method.
_MIXED = ["mixup={pseudo: true}", "pseudo.smoothing=0.1"]
SMALL = {
    "semivim": (BACKBONES["vim"]["distill"], [*BACKBONES["vim"]["semi"], *_MIXED]),
    "semivit": (BACKBONES["vit"]["distill"], [*BACKBONES["vit"]["semi"], *_MIXED]),
    "fixmatch": (
        ["model={name: timm/resnet10t, image_size: 32}"],
        ["pseudo.labeller=student", "ema.mode=ema"],
    ),
}
SMALL_EMA = {LYAPEMA: [], PLAIN_EMA: ["ema.mode=ema"]}  # configs/semi/study.yaml is guarded


def commands(row: Row, dataset: str, nproc: int) -> list[list[str]]:
    """The commands that produce a row, in order.

    Args:
        row: The row.
        dataset: `imagenet`, or the name of a bundled dataset.
        nproc: Processes for each stage.

    Returns:
        Argument lists: convert (bundled datasets only), split, stage 1 (Semi-ViM on ImageNet only), stage 2, stage 3.
    """
    small = dataset != "imagenet"
    data = Path("data") / dataset
    split = data / f"table-{row.pool}.json"
    options = list(row.split)
    if small and row.long_tailed:
        options += ["--imbalance", "256"]  # ImageNet-LT is a dataset; here its imbalance is made
    elif row.long_tailed:
        options += ["--pool-list", LT_LIST]
    if small and "--ood-classes" in options:
        options[options.index("--ood-classes") + 1] = "1"  # one in a hundred classes, at least one
    held_out = "1" if row.long_tailed and not small else "10"  # ImageNet-LT's rarest class has five images
    start = ["stages"] if nproc == 1 else ["launchers", "local"]
    tail = [] if nproc == 1 else ["--nproc", str(nproc)]

    def stage(name: str, config: str, experiment: str, values: Sequence[str]) -> list[str]:
        where = [f"run.experiment={experiment}", f"data.train={data / 'train'}", *values]
        return [sys.executable, "-m", *start, name, f"configs/{name}/{config}.yaml", *where, *tail]

    family = row.model.partition("_")[0]
    parent = f"table-{dataset}-{family if small else row.model}-{row.pool}"
    evaluated = [f"data.test={data / ('test' if small else 'val')}", f"data.split={split}"]
    export = RUNS / parent / "distill" / "export"
    if small:
        configs, (first, method) = ("study", "study"), SMALL[family]
        own = [value for given in row.values for value in SMALL_EMA.get(given, [given])]
        starts, second = [f"init_from={export}"], [*method, *own]
    else:
        found = recipe(row)
        configs = found.configs
        first, settings = found.overrides(row)
        starts = found.starts(export)
        second = [*settings, *row.values]  # a row's tau after the recipe's
    made = [sys.executable, "-m", "pipeline.data", "split", str(data / "train"), "--out", str(split), *options]
    plan = [[*made, "--validation-per-class", held_out]]
    if small:
        plan.insert(0, [sys.executable, "-m", "pipeline.data", "convert", dataset, "--out", str(data)])
    if family == "semivim" and not small:
        values = [f"model.name={row.model}", *pretraining()]
        plan.append(stage("arm", "imagenet_semivim_base", f"table-{dataset}-{row.model}", values))
    plan.append(stage("distill", configs[0], parent, [*evaluated, *first]))
    plan.append(stage("semi", configs[1], experiment(row, dataset), [*evaluated, *starts, *second]))
    return plan


def experiment(row: Row, dataset: str) -> str:
    """The name of the experiment that holds a row's stage 3."""
    return f"table-{dataset}-{row.name}"


def results(asked: Sequence[Row], dataset: str) -> Table:
    """Our results beside the reported ones.

    Args:
        asked: The rows of the table.
        dataset: The dataset that ours were run on.

    Returns:
        One line per row. In a sweep of tau, the row with the best validation accuracy so far is marked as chosen.
    """
    validated = {row.name: _validation(row, dataset) for row in asked}
    cells = []
    for row in asked:
        rivals = [validated[r.name] for r in asked if _sweep(r) and _sweep(r) == _sweep(row)]
        best = max((v for v in rivals if v is not None), default=None)
        own = validated[row.name]
        shown = "" if own is None else f"{own:.2f}" + (" (chosen)" if own == best else "")
        cells.append([row.name, row.model, row.reported, _ours(row, dataset), shown, ", ".join(row.notes)])
    used = sorted({note for row in asked for note in row.notes})
    return Table(
        name=f"paper-{dataset}",
        title="Rows of the paper: percent on the test set, top-1 or top-1/head/tail",
        header=["row", "model", "reported (ImageNet)", f"ours ({dataset})", "ours, validation top-1", "notes"],
        rows=cells,
        note="; ".join(f"{key}: {FOOTNOTES[key]}" for key in used),
    )


def _sweep(row: Row) -> str:
    """The sweep of tau that a row belongs to; empty for the other rows."""
    return row.name.rpartition("-")[0] if row.name.startswith("T3-") else ""


def _ours(row: Row, dataset: str) -> str:
    folder = RUNS / experiment(row, dataset) / "semi"
    if not (folder / "evaluation.json").is_file():
        return ""
    found = evaluation(folder)["teacher"]
    top1 = "top1_seen" if "top1_seen" in found else "top1"  # classes without training images are evaluated separately
    names = (top1, "head", "tail") if "/" in row.reported else (top1,)
    return "/".join(f"{found[name]:.2f}" for name in names)


def _validation(row: Row, dataset: str) -> float | None:
    """The teacher's validation top-1 after the last step; None if the row is not complete."""
    folder = RUNS / experiment(row, dataset) / "semi"
    if not (folder / "evaluation.json").is_file():
        return None
    logged = metrics(folder)
    return next((line["val/teacher_top1"] for line in reversed(logged) if "val/teacher_top1" in line), None)


def main(arguments: list[str] | None = None) -> int:
    """Run the rows that were asked for, print the table and write it.

    Args:
        arguments: Words of the command line; None reads those of this process.

    Returns:
        The exit code of the first command that failed, else 0.
    """
    parser = argparse.ArgumentParser(
        "python -m studies.tables", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("row", nargs="?", metavar="ROW", help="a name, or how the names of several rows begin")
    parser.add_argument("--dataset", choices=["imagenet", "letters", "digits"], default="imagenet")
    parser.add_argument("--nproc", type=int, default=1, help="processes for each stage (default 1)")
    parser.add_argument("--print", action="store_true", help="print the commands without starting them")
    args = parser.parse_args(arguments)
    asked = [row for row in rows() if row.name.startswith(args.row or "")]
    if not asked:
        parser.error(f"no row begins with {args.row!r}; without a name all rows are listed")
    started: list[list[str]] = []
    for command in (c for row in asked for c in commands(row, args.dataset, args.nproc)) if args.row else ():
        if command in started:
            continue
        started.append(command)
        print(" ".join(f"'{c}'" if " " in c else c for c in command), flush=True)
        if not args.print and (code := subprocess.run(command, check=False).returncode):
            return code
    if not args.print:
        made = results(asked, args.dataset)
        made.write(RUNS / "study" / "tables")
        print(f"\n{made.title}\n\n{made.markdown()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
