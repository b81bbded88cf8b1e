"""Experiments side by side: those that differ in their seeds only are one design, and designs are named by what differs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pipeline.config import flatten
from pipeline.report.results import METRICS, Result, judged_rows, mean_and_spread
from pipeline.report.tables import Table

# What names a run, or says where and how fast it runs: no design.
_NO_DESIGN = (
    "run.", "engine.", "loop.log_every", "loop.eval_every", "loop.save_every", "loop.keep_", "loop.background_save",
    "loop.time_limit_minutes", "loop.vote_every", "data.eval_batch", "data.loader.workers", "data.loader.prefetch",
)  # fmt: skip
_COMPARED = ("top1", "tail")


class NotPaired(Exception):
    """Two designs were not asked the same: the text says what differs."""


class Comparison(NamedTuple):
    gains: dict[str, tuple[float, float, float, float]]  # metric -> gain, low, high, p
    seeds: Sequence[int]  # the pairs


Compare = Callable[[Sequence[Result], Sequence[Result], str], Comparison]  # first design, another, row of the table


@dataclass(frozen=True, kw_only=True)
class Design:
    """`values`: every key of the configs of all stages -> its value."""

    values: dict[str, str]
    results: list[Result]


def designs_of(results: Sequence[Result]) -> list[Design]:
    """In the order of their first experiment."""
    found: list[Design] = []
    for result in results:
        values = _values(result)
        known = next((d for d in found if d.values == values), None)
        if known:
            known.results.append(result)
        else:
            found.append(Design(values=values, results=[result]))
    return found


def differences(designs: Sequence[Design]) -> list[dict[str, str]]:
    """For each design, key -> value of what is not alike in all of them; a key that is missing is "–"."""
    keys = dict.fromkeys(key for d in designs for key in d.values)
    differing = [key for key in keys if len({d.values.get(key) for d in designs}) > 1]
    return [{key: d.values.get(key, "–") for key in differing} for d in designs]


def ablation_table(designs: Sequence[Design], compare: Compare) -> Table:
    """One row a design: what is different, its seeds, its numbers, and what it gains over the first one."""
    every = [r for d in designs for r in d.results]
    row = judged_rows(every)[-1]
    named = differences(designs)
    gains = [f"Δ {m} [95 %], p" for m in _COMPARED]
    rows, remarks = [], []
    for i, (design, different) in enumerate(zip(designs, named, strict=True)):
        name = _named(different, list(design.results[0].stages)) or design.results[0].name
        cells = [mean_and_spread(design.results, row, m) for m in METRICS]
        found: dict[str, tuple[float, float, float, float]] = {}
        if i:
            try:
                found, seeds = compare(designs[0].results, design.results, row)
                if len(seeds) < max(len(designs[0].results), len(design.results)):
                    remarks.append(f"{name}: gains over the seeds that both have, {', '.join(map(str, seeds))}.")
            except NotPaired as reason:
                remarks.append(f"{name}: no paired gain, {reason}.")
        rows.append(
            [
                name,
                str(len(design.results)),
                *(
                    "–" if c is None else f"{c[0]:.2f}" + (f" ± {c[1]:.1f}" if len(design.results) > 1 else "")
                    for c in cells
                ),
                *("first" if not i else _gain(found.get(m)) for m in _COMPARED),
            ]
        )
    note = (
        f"{row}, percent. Gains over the first design by paired bootstrap: the test images are redrawn inside each class, "
        "pairs are of equal run.seed and not redrawn; p is two-sided. " + " ".join(remarks)
    ).strip()
    return Table(
        name="ablation",
        title="Designs side by side",
        header=["what differs", "seeds", *METRICS, *gains],
        rows=rows,
        note=note,
    )


def _named(different: dict[str, str], stages: Sequence[str]) -> str:
    """`semi.threshold=0.9, loop.steps=60`: a stage stands before what is not alike in all stages that have the key."""
    words = []
    for key, value in different.items():
        stage, _, rest = key.partition(".")
        alike = [s for s in stages if different.get(f"{s}.{rest}") == value]
        everywhere = len(stages) > 1 and alike == list(stages)
        if not everywhere or stage == stages[0]:
            words.append(f"{rest if everywhere else key}={value}")
    return ", ".join(words)


def _gain(found: tuple[float, float, float, float] | None) -> str:
    if found is None:
        return "–"
    value, low, high, p = found
    return f"{value:+.2f} [{low:+.2f}, {high:+.2f}], {'< 0.001' if p < 0.001 else f'{p:.3f}'}"


def _values(result: Result) -> dict[str, str]:
    values: dict[str, str] = {}
    for stage, run in result.stages.items():
        for key, value in flatten(run.config).items():
            if key == "data.split" and result.protocol:
                value = result.protocol.rsplit("; seed", 1)[0]  # the seeds of one design have splits of their own
            if not key.startswith(_NO_DESIGN):
                values[f"{stage}.{key}"] = str(value)
    return values
