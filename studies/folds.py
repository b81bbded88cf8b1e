"""Cross-validate stages 2 and 3, where labels are too few to hold any out.

    python -m studies.folds NAME [--folds 5] [KEY=VALUE ...]

`make chain NAME=mine` trains the models to keep, on all labels of a split without validation. This command then trains stages 2
and 3 once more for each fold of that split, on the labels of the other folds, and evaluates them on the images of the fold. Stage
1 has learnt no label, so all folds share it. Each labelled image is evaluated once, by models that have not learnt its label.

The result is FOLDS in the experiment's folder; the report of the experiment quotes it. A run that is complete is reused. No
stage chooses anything by validation scores, so the folds estimate the models that all labels train, with fewer labels: the
estimate is a little too low.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from launchers.chain import CHAIN, Step, read_steps
from pipeline.cli import guarded
from pipeline.datasets.folds import fold_path, make_folds
from pipeline.datasets.joint import read_manifests
from pipeline.datasets.splits import read_split, write_split
from pipeline.errors import ConfigError
from pipeline.files import replace_text
from pipeline.report.results import FOLDS, ROWS
from studies.runs import evaluation, run


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return guarded(_run, sys.argv[1:] if arguments is None else arguments)


def _run(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "python -m studies.folds", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", metavar="NAME", help="configs/STAGE/NAME.yaml of every stage, as for make chain")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="overrides, as for make chain")
    parser.add_argument("--folds", type=int, default=5, metavar="K", help="how many parts (default 5)")
    given = parser.parse_intermixed_args(arguments)
    arm, *steps = read_steps(CHAIN, given.name, given.overrides)
    paths = _splits(steps[-1], given.folds)
    run(arm.stage, arm.path.stem, arm.overrides, name="stage 1")
    experiment = arm.folder.parent
    found: dict[str, list[dict[str, Any]]] = {}
    for number, path in enumerate(paths, 1):
        name = f"{experiment.name}-fold{number}of{given.folds}"
        own = ["data.test=null", "data.validation=null", f"data.split={path}", f"run.experiment={name}"]
        for step in steps:
            parent = [f"init_from={arm.folder}/export"] if step.values.get("init_from") == arm.stage else []
            run(step.stage, step.path.stem, [*step.overrides, *parent, *own], name=f"fold {number}, {step.stage}")
            for row, (stage, model) in ROWS.items():
                results = evaluation(experiment.with_name(name) / stage) if stage == step.stage else {}
                if model in results:
                    found.setdefault(row, []).append(results[model])
    result = summary(found)
    replace_text(experiment / FOLDS, json.dumps(result, indent=1) + "\n")
    print(result["sentence"])
    return 0


def summary(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Pool the folds of each row of the report's table, image by image.

    Args:
        found: Row -> the metrics of each fold; `confusion` counts images by true and predicted class.
    """
    rows = {}
    for row, folds in found.items():
        confusion = np.sum([fold["confusion"] for fold in folds], axis=0)
        counts = confusion.sum(axis=1)
        recall = np.diag(confusion)[counts > 0] / counts[counts > 0]
        rows[row] = {
            "top1": float(np.trace(confusion) / confusion.sum()),
            "balanced": float(recall.mean()),
            "folds": [fold["top1"] for fold in folds],
            "spread": statistics.stdev(fold["top1"] for fold in folds),
            "images": int(confusion.sum()),
        }
    first = next(iter(rows.values()))
    words = ", ".join(
        f"{row} {100 * r['top1']:.1f} % (spread of the folds {100 * r['spread']:.1f})" for row, r in rows.items()
    )
    sentence = (
        f"cross-validation in {len(first['folds'])} folds: each of {first['images']} labelled images is evaluated once, by models"
        f" that have not learnt its label; top-1 of {words}"
    )
    return {"sentence": sentence, "rows": rows}


def _splits(step: Step, count: int) -> list[Path]:
    """Write the splits of the folds beside the config's split, as `pipeline.data split --folds` does."""
    data = step.config.data
    if data.split is None:
        raise ConfigError(
            f"{step.path}: cross-validation needs data.split, a split of all labels; make it with `python -m pipeline.data split"
            " DATA --out FILE`"
        )
    manifest = read_manifests(data.train_folders, data.opening)
    split = read_split(data.split, manifest)
    paths = [fold_path(data.split, k + 1, count) for k in range(count)]
    for path, fold in zip(paths, make_folds(split, manifest, count, split.header["seed"]), strict=True):
        write_split(fold, path)
    return paths


if __name__ == "__main__":
    sys.exit(main())
