"""Compare networks in equal work: which learns most from few labels?

    python -m studies.networks --work 0.5 --sets digits letters glyphs --regime 4 --networks efficientvim_nano timm/resnet18

Each network trains from random weights on the labelled images alone, by stage 2, with what the recipe writes for the case: views,
batch and schedule. Its steps are as many as the work pays for. The learning rate that is best on the validation images counts.
So a network whose steps are cheap takes more of them. The last line is one JSON object: set -> network -> what it reached.

A run that is complete is reused, from runs/networks.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.cli import guarded
from pipeline.models import build_model
from pipeline.models.flops import forward_flops
from pipeline.report.results import read_result
from pipeline.report.tables import Table
from studies.runs import run
from studies.scoreboard import pictures
from studies.scoreboard.pictures import Case
from studies.scoreboard.recipe import Chain

RUNS = Path("runs/networks")
NETWORKS = ("efficientvim_nano", "efficientvim_mini", "timm/resnet18")
RATES = (1e-3, 3e-3, 6e-3)  # learning rates at a batch of 32


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return guarded(_run, sys.argv[1:] if arguments is None else arguments)


def _run(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "python -m studies.networks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=float, default=0.5, help="10^12 FLOPs of each run (default 0.5)")
    parser.add_argument("--sets", nargs="+", choices=pictures.BUNDLED, default=["digits", "letters", "glyphs"])
    parser.add_argument("--regime", choices=pictures.REGIMES, default="4", help="labels (default 4 a class)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), metavar="NAME", help="names of model.name")
    given = parser.parse_args(arguments)
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name in given.sets:
        case = pictures.split_of(pictures.prepared(name), given.regime, given.seed)
        known = f"{name}-{given.regime}-seed{given.seed}"
        found[name] = {network: _best(case, known, network, given.work, given.seed) for network in given.networks}
    rows = [
        [name, *(f"{cell['top1']:.1f} ({cell['steps']} steps, lr {cell['lr']:g})" for cell in row.values())]
        for name, row in found.items()
    ]
    print(Table(name="networks", title="Top-1 on the test set", header=["", *given.networks], rows=rows).markdown())
    print(json.dumps(found))
    return 0


def _best(case: Case, name: str, network: str, work: float, seed: int) -> dict[str, Any]:
    """Train a network at each learning rate; returns what the best on the validation images reached on the test images."""
    config, batch, side = Chain(RUNS, "recipe", "1T").of(case, name)["distill"], 32, 32
    model = build_model(network, image_size=side, num_classes=len(case.manifest.classes))
    steps = max(20, round(1e12 * work / (3 * forward_flops(model, (side, side)) * batch)))
    tried: list[dict[str, Any]] = []
    for rate in RATES:
        experiment = f"{name}-{network.replace('/', '-')}-{work:g}-{rate:g}"
        own = [
            f"run.root={RUNS}", f"run.experiment={experiment}", f"run.seed={seed}", f"data.train={case.train}",
            f"data.split={case.split_file}", f"data.test={case.test}", f"model={{name: {network}, image_size: {side}}}",
            f"optim={{lr: {rate:g}, warmup_steps: {max(1, steps // 20)}, clip_norm: 3.0}}",
            f"loop={{steps: {steps}, global_batch: {batch}, select: best, eval_every: {max(1, steps // 10)}}}",
        ]  # fmt: skip
        run("distill", config, own, name=f"{name}, {network}, lr {rate:g}")
        stage = read_result(RUNS / experiment).stages["distill"]
        top1 = stage.evaluation["models"]["student"]["top1"]
        tried.append({"top1": top1, "validated": stage.validated("student") or 0.0, "lr": rate, "steps": steps,
                      "seconds": round(stage.seconds(), 1)})  # fmt: skip
    return max(tried, key=lambda cell: cell["validated"])


if __name__ == "__main__":
    sys.exit(main())
