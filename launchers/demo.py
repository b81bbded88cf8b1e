"""The whole chain on the bundled digits: shards, three stages for each seed, a table and a report.

Everything is a run like any other, so whatever is done already is reused and whatever was interrupted continues.
"""

import time
from collections.abc import Sequence
from pathlib import Path

from launchers import chain, local
from launchers.plan import planner
from pipeline.report import experiment as report
from pipeline.report.results import Result, read_result, table

DATA = Path("data/digits")
RUNS = Path("runs")
PROTOCOL = "--imbalance 10 --labelled 0.1 --validation-per-class 15".split()


def run(seeds: Sequence[int], nproc: int) -> int:
    """Returns 0, or the exit code of the first step that did not complete."""
    from pipeline.data import main as data

    started = time.monotonic()
    experiments = [f"demo-seed{seed}" for seed in seeds]
    code = data(["convert", "digits", "--out", str(DATA)])
    for seed, experiment in zip(seeds, experiments, strict=True):
        split = DATA / f"split-seed{seed}.json"
        code = code or data(["split", str(DATA / "train"), "--out", str(split), *PROTOCOL, "--seed", str(seed)])
        if code:
            return code
        overrides = [f"run.experiment={experiment}", f"run.seed={seed}", f"data.split={split}"]
        steps = chain.read_steps(chain.CHAIN, "demo", overrides)
        planner.plan_ahead(steps, nproc)
        code = local.run(steps, nproc)
    if code:
        return code
    results = [read_result(RUNS / name) for name in experiments]
    print(f"\n{table(results)}\n")
    names = ", ".join(map(str, seeds))
    print(f"stage 3's teacher gains {_gain(results):+.2f} points of top-1 over stage 2, mean over seeds {names}")
    folder = "demo" if len(seeds) > 1 else experiments[0]
    page = report.run([RUNS / name for name in experiments], RUNS / folder / "report.html")
    print(f"report: {page}   ({time.monotonic() - started:.0f} s)")
    return 0


def _gain(results: Sequence[Result]) -> float:
    """Points of top-1 that stage 3's teacher adds to stage 2, mean over the seeds."""
    return sum(r.models["stage 3, teacher"]["top1"] - r.models["stage 2"]["top1"] for r in results) / len(results)
