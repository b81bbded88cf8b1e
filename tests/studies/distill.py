"""Does a teacher pay: python -m tests.studies.distill [--seeds 0 1 2 3 4]

On the bundled digits, one split a seed, a tenth of the labels, imbalance 10. The teacher is the demo's Vision Mamba, pretrained
by ARM and fine-tuned on the labelled tenth; the student a small EfficientViM from random weights, on the same labels, with and
without that teacher. All are ordinary runs, so what is done already is reused. Judged on the balanced test set, once. Prints a
table, then one JSON object.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import fmean, stdev

from pipeline.data.__main__ import main as data

DIGITS, RUNS = Path("data/digits"), Path("runs/study-distill")
PROTOCOL = "--imbalance 10 --labelled 0.1 --validation-per-class 15".split()
ROWS = {
    "teacher": "Vision Mamba (the teacher)",
    "taught": "EfficientViM, taught",
    "labels": "EfficientViM, labels alone",
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m tests.studies.distill", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    seeds = parser.parse_args(arguments).seeds
    data(["convert", "digits", "--out", str(DIGITS)])
    top1: dict[str, list[float]] = {row: [] for row in ROWS}
    for seed in seeds:
        split = DIGITS / f"split-seed{seed}.json"
        data(["split", str(DIGITS / "train"), "--out", str(split), *PROTOCOL, "--seed", str(seed)])
        common = [f"run.root={RUNS}", f"run.seed={seed}", f"data.split={split}"]
        run("arm", "demo", [*common, f"run.experiment=teacher-{seed}"])
        run("distill", "demo", [*common, f"run.experiment=teacher-{seed}"])
        export = f"teacher.export={RUNS / f'teacher-{seed}' / 'distill' / 'export'}"
        run("distill", "demo_efficientvim", [*common, f"run.experiment=taught-{seed}", export])
        run("distill", "demo_efficientvim", [*common, f"run.experiment=labels-{seed}", "teacher=null"])
        for row in ROWS:
            top1[row].append(judged(RUNS / f"{row}-{seed}" / "distill"))
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


def run(stage: str, config: str, overrides: list[str]) -> None:
    command = [sys.executable, "-m", "stages", stage, f"configs/{stage}/{config}.yaml", *overrides]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    if done.returncode:
        raise SystemExit(done.stderr)


def judged(folder: Path) -> float:
    """Of what was exported: the average where there is one."""
    models = json.loads((folder / "evaluation.json").read_text())["models"]
    return float(models.get("average", models["student"])["top1"])


def spread(values: list[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


if __name__ == "__main__":
    sys.exit(main())
