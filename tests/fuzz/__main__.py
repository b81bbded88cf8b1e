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
from collections.abc import Sequence
from pathlib import Path

from tests.fuzz.kinds import KINDS, NEED_RUNS, SHARES, Material
from tests.fuzz.material import material

JOBS = max(1, min(4, os.cpu_count() or 1))
TURN = 48  # cases after which the kinds begin anew


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
        numbers = [given.only] if given.only is not None else range(given.cases)
        order = turns(kinds)
        with material(scratch, trained=not NEED_RUNS.isdisjoint(kinds)) as have:
            found = run([(order[number % len(order)], number) for number in numbers], given.seed, scratch, have)
        if given.only is not None:
            print((scratch / "case-0" / "stderr").read_text(errors="replace")[-4000:])
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print(json.dumps(found))
    return int(found["violations"] > 0)


def turns(kinds: Sequence[str]) -> list[str]:
    """Return the order in which the kinds take turns: those of `SHARES` rarely, the others equally often."""
    common = [kind for kind in kinds if kind not in SHARES]
    if not common:
        return list(kinds)
    order = (common * TURN)[: TURN - sum(SHARES[kind] for kind in kinds if kind in SHARES)]
    for kind in kinds:
        for k in range(SHARES.get(kind, 0)):
            order.insert((k + 1) * len(order) // SHARES[kind], kind)
    return order


def run(cases: list[tuple[str, int]], seed: int, scratch: Path, have: Material) -> dict[str, object]:
    """Run cases, several at a time, and print each violation with the command that repeats it.

    Returns:
        The number of cases and of those that broke the law, in all and per kind.
    """
    from tests.fuzz.law import Running, ended, start

    before, done = _state(have), 0
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
            done += 1
            if done % 1000 == 0:
                print(f"{done} of {len(cases)}", file=sys.stderr, flush=True)
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
    paths = sorted(
        p for root in (have.digits, have.small, have.runs, have.export, have.weights.parent) for p in root.rglob("*")
    )
    return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # the threads of torch are not waited for
