"""Feed damaged and hostile inputs to the product, and name every case that breaks the law of `tests/fuzz/law.py`.

python -m tests.fuzz --cases N --seed S [--kind config,card,...] [--only NUMBER]

A case is decided by the seed, its kind and its number alone. The last line is one JSON object.
"""

import argparse
import collections
import json
import os
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path

from tests.fuzz import checkpoints
from tests.fuzz.kinds import KINDS, Material

JOBS = max(1, min(4, os.cpu_count() or 1))


def main(arguments: list[str] | None = None) -> int:
    """Run the cases; 0 if none broke the law."""
    parser = argparse.ArgumentParser("python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", default=",".join(KINDS), help=f"of {', '.join(KINDS)}, with commas")
    parser.add_argument("--only", type=int, help="run this case alone, and show what it says")
    given = parser.parse_args(arguments)
    kinds = given.kind.split(",")
    if unknown := set(kinds) - set(KINDS):
        parser.error(f"unknown kind {', '.join(unknown)}; known: {', '.join(KINDS)}")
    scratch = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        have = material(scratch)
        numbers = [given.only] if given.only is not None else range(given.cases)
        found = run([(kinds[number % len(kinds)], number) for number in numbers], given.seed, scratch, have)
        if given.only is not None:
            print((scratch / "case-0" / "stderr").read_text(errors="replace")[-4000:])
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print(json.dumps(found))
    return int(found["violations"] > 0)


def run(cases: list[tuple[str, int]], seed: int, scratch: Path, have: Material) -> dict[str, object]:
    """Run cases, several at a time, and print each violation with the command that repeats it.

    Returns:
        The number of cases and of those that broke the law, in all and per kind.
    """
    from tests.fuzz.law import Running, ended, start

    before = _state(have)
    counts = {kind: {"cases": 0, "violations": 0} for kind, _ in cases}
    waiting, running = collections.deque(cases), dict[int, Running]()
    while waiting or running:
        for slot in range(JOBS):
            if slot not in running and waiting:
                kind, number = waiting.popleft()
                running[slot] = start(kind, number, seed, scratch / f"case-{slot}", have)
        for slot, case in list(running.items()):
            broken = ended(case)
            if broken is None:
                continue
            del running[slot]
            counts[case.kind]["cases"] += 1
            counts[case.kind]["violations"] += bool(broken)
            for violation in broken:
                print(f"{case.kind} {case.number}: {violation}")
            if broken:
                kinds = f"--kind {case.kind}"
                print(f"  python -m tests.fuzz --seed {seed} {kinds} --only {case.number}", flush=True)
        time.sleep(0.002)
    total = {name: sum(count[name] for count in counts.values()) for name in ("cases", "violations")}
    if _state(have) != before:
        print("earlier results were changed")
        total["violations"] += 1
    return {**total, **counts}


def _state(have: Material) -> list[tuple[str, int, int]]:
    """Names, sizes and times of what no case may change."""
    paths = sorted(p for root in (have.digits, have.export, have.weights.parent, have.runs) for p in root.rglob("*"))
    return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]


def material(scratch: Path) -> Material:
    """Import what the commands import, so that children start at once, and make sound inputs."""
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    warnings.simplefilter("ignore")
    import logging

    import torch

    torch.set_num_threads(1)
    for module in (
        "stages.__main__",
        "stages.drivers",
        "stages.arm",
        "stages.distill",
        "stages.semi",
        "pipeline.models.__main__",
        "pipeline.exports.convert",
    ):
        __import__(module)
    from pipeline.data import main as data
    from pipeline.exports.export import load_export
    from pipeline.ops.torchvision_cpu import allow_torchvision
    from pipeline.train.distributed import _import_deepspeed
    from stages.__main__ import main as train
    from tests.unit.exports.released import checkpoint, filled
    from tests.unit.exports.test_convert import SMALL
    from tests.unit.exports.test_export import exported

    allow_torchvision()
    import timm  # noqa: F401 - imported for the children

    os.environ |= {"DS_ACCELERATOR": "cpu", "DEEPSPEED_LOG_LEVEL": "error"}
    _import_deepspeed()

    logging.disable(logging.INFO)
    digits = scratch / "digits"
    with open(os.devnull, "w") as nothing:
        shown, sys.stdout = sys.stdout, nothing
        try:
            data(["convert", "digits", "--out", str(digits)])
            options = "--imbalance 10 --labelled 0.1 --validation-per-class 15 --seed 0".split()
            data(["split", str(digits / "train"), "--out", str(digits / "split.json"), *options])
        finally:
            sys.stdout = shown
    exported(scratch / "export", classes=tuple("0123456789"))
    load_export(scratch / "export")  # builds and loads the kernels
    (scratch / "weights").mkdir()
    torch.save(checkpoint(filled(SMALL["vim"])), scratch / "weights" / "vim.pth")
    pid = os.fork()  # training starts threads, which the forks of the cases must not find
    if pid == 0:
        train(["arm", *checkpoints.overrides(str(scratch / "runs"), digits)])
        os._exit(0)
    os.waitpid(pid, 0)
    checkpoints.stop_before_the_end(scratch / "runs" / "finished", scratch / "runs" / "stopped")
    return Material(digits, scratch / "export", scratch / "weights" / "vim.pth", scratch / "runs")


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # the threads of torch are not waited for
