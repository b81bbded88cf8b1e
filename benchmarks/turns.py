"""Rivals take turns in rounds, so that other work on the machine slows all of them together."""

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

BUDGET = 200.0  # seconds for all rounds
LEAST = 3  # rounds, however long they take


def medians(
    rivals: Mapping[str, Callable[[], Any]], rounds: int, *, rest: float = 0.0, budget: float = BUDGET, warm_up: int = 1
) -> dict[str, float]:
    """Return the median seconds of each rival, and print the quartiles.

    Args:
        rivals: What to time, by name.
        rounds: Rounds in which each rival has one turn.
        rest: Seconds of rest before each turn.
        budget: Seconds after which no further round begins; fewer rounds are said on stderr.
        warm_up: Calls of each rival before the rounds: some things are built, chosen or allocated once.
    """
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for run in rivals.values():
        for _ in range(warm_up):
            run()
    start = time.perf_counter()
    for done in range(rounds):
        if done >= LEAST and time.perf_counter() - start > budget:
            print(f"stopped after {done} of {rounds} rounds: {budget:.0f} s are over", file=sys.stderr)
            break
        for name, run in rivals.items():
            time.sleep(rest)
            begin = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begin)
    for name, values in seconds.items():
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
        print(f"{name:40s} {1e3 * middle:9.2f} ms, quartiles {1e3 * low:.2f} to {1e3 * high:.2f}, {len(values)} rounds")
    return {name: statistics.median(values) for name, values in seconds.items()}
