"""Study of stage 2: does a teacher help?

Command: `python -m studies.distill [--seeds 0 1 2 3 4]`

The images are the bundled digits at imbalance 10. Each seed has its own split with a tenth of the labels. The teacher is
the demo's Vision Mamba, pretrained by ARM and fine-tuned on the labelled tenth. The student is a small EfficientViM that
starts from random weights. It learns from the same labels in three ways: alone, with the teacher on labelled images, and
with the teacher on unlabelled images too.

Every row is made of ordinary runs, so complete ones are reused. Each model is evaluated once, on the balanced test set.
The command prints a table, then one JSON object.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import fmean, stdev

from studies.runs import evaluation, prepare, run

DIGITS, RUNS = Path("data/digits"), Path("runs/study-distill")
PROTOCOL = "--imbalance 10 --labelled 0.1 --validation-per-class 15".split()
ROWS = {
    "teacher": "Vision Mamba (the teacher)",
    "taught": "EfficientViM, taught",
    "plain": "  taught on labelled images only",
    "labels": "EfficientViM, labels alone",
}


def main(arguments: list[str] | None = None) -> int:
    """Run what is missing and print the table.

    Args:
        arguments: Words of the command line; None reads those of this process.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(
        "python -m studies.distill", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    seeds = parser.parse_args(arguments).seeds
    prepare("convert", "digits", "--out", str(DIGITS))
    top1: dict[str, list[float]] = {row: [] for row in ROWS}
    for seed in seeds:
        prepare("split", str(DIGITS / "train"), "--out", str(split_of(seed)), *PROTOCOL, "--seed", str(seed))
        export = f"teacher.export={RUNS / f'teacher-{seed}' / 'distill' / 'export'}"
        begin("arm", "demo", seed, "teacher")
        begin("distill", "demo", seed, "teacher")
        begin("distill", "demo_efficientvim", seed, "taught", export)
        begin("distill", "demo_efficientvim", seed, "plain", export, "teacher.unlabelled_ratio=0")
        begin("distill", "demo_efficientvim", seed, "labels", "teacher=null")
        for row in ROWS:
            top1[row].append(accuracy(RUNS / f"{row}-{seed}" / "distill"))
        print(f"seed {seed}: " + ", ".join(f"{row} {values[-1]:.2f}" for row, values in top1.items()), flush=True)
    print(f"\n{'top-1, test':30s}{'mean':>8s}{'spread':>8s}")
    for row, title in ROWS.items():
        print(f"{title:30s}{fmean(top1[row]):8.2f}{spread(top1[row]):8.2f}")
    gains = [a - b for a, b in zip(top1["taught"], top1["labels"], strict=True)]
    print(f"the teacher gives {fmean(gains):+.2f} ± {spread(gains):.2f} points, paired over seeds {seeds}\n")
    print(
        json.dumps({"gain": round(fmean(gains), 3), "gains": gains, **{k: round(fmean(v), 3) for k, v in top1.items()}})
    )
    return 0


def begin(stage: str, config: str, seed: int, row: str, *own: str) -> None:
    """Run configs/STAGE/CONFIG.yaml for one row and seed, with the overrides `own`."""
    values = [f"run.root={RUNS}", f"run.seed={seed}", f"data.split={split_of(seed)}", f"run.experiment={row}-{seed}"]
    run(stage, config, [*values, *own], name=f"seed {seed}, {stage}, {row}")


def split_of(seed: int) -> Path:
    """The split of one seed."""
    return DIGITS / f"split-seed{seed}.json"


def accuracy(folder: Path) -> float:
    """Test top-1 of the exported model in percent: the average of the weights if the stage kept one, else the student."""
    models = evaluation(folder)
    return float(models.get("average", models["student"])["top1"])


def spread(values: list[float]) -> float:
    """Standard deviation; 0 for a single value."""
    return stdev(values) if len(values) > 1 else 0.0


if __name__ == "__main__":
    sys.exit(main())
