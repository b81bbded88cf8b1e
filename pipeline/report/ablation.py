"""Compare designs: experiments that differ only in their seeds are one design, named by its different config keys."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pipeline.identity import flatten
from pipeline.report.results import METRICS, Result, evaluated_rows, mean_and_spread
from pipeline.report.tables import Table

# Keys that name a run, or decide only where and how fast it runs, do not make a design.
_NO_DESIGN = (
    "run.", "engine.", "loop.log_every", "loop.eval_every", "loop.save_every", "loop.keep_", "loop.background_save",
    "loop.time_limit_minutes", "loop.vote_every", "data.eval_batch", "data.loader.workers", "data.loader.prefetch",
)  # fmt: skip
_COMPARED = ("top1", "tail")


class NotPaired(Exception):
    """Two designs were not evaluated on the same images; the text says what differs."""


class Comparison(NamedTuple):
    """Gains of one design over another.

    Attributes:
        gains: Metric -> gain in points, lower and upper end of its interval, p-value.
        seeds: Seeds of the pairs.
    """

    gains: dict[str, tuple[float, float, float, float]]
    seeds: Sequence[int]


# Takes the experiments of the first design, those of another, and a row of the table.
Compare = Callable[[Sequence[Result], Sequence[Result], str], Comparison]


@dataclass(frozen=True, kw_only=True)
class Design:
    """Experiments with equal configs.

    Attributes:
        values: `STAGE.KEY` of every config key that makes a design -> its value.
        results: The experiments.
    """

    values: dict[str, str]
    results: list[Result]


def designs_of(results: Sequence[Result]) -> list[Design]:
    """Group experiments into designs, in the order of their first experiments."""
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
    """Return for each design the keys, with values, that are not equal in all designs; "–" if a key is missing."""
    keys = dict.fromkeys(key for d in designs for key in d.values)
    differing = [key for key in keys if len({d.values.get(key) for d in designs}) > 1]
    return [{key: d.values.get(key, "–") for key in differing} for d in designs]


def ablation_table(designs: Sequence[Design], compare: Compare) -> Table:
    """Make the table of designs: different keys, number of seeds, metrics, and gains over the first design.

    Args:
        designs: Two or more designs.
        compare: Computes the gains; its `NotPaired` becomes a remark below the table.
    """
    every = [r for d in designs for r in d.results]
    row = evaluated_rows(every)[-1]
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
                    remarks.append(
                        f"{name}: gains use the seeds that both designs have ({', '.join(map(str, seeds))})."
                    )
            except NotPaired as reason:
                remarks.append(f"{name}: no paired gain: {reason}.")
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
        f"{row}, percent. Gains over the first design come from a paired bootstrap: test images are redrawn inside each "
        "class, pairs have equal run.seed and are not redrawn, and p is two-sided. " + " ".join(remarks)
    ).strip()
    return Table(
        name="ablation",
        title="Comparison of designs",
        header=["different keys", "seeds", *METRICS, *gains],
        rows=rows,
        note=note,
    )


def _named(different: dict[str, str], stages: Sequence[str]) -> str:
    """Return `semi.threshold=0.9, loop.steps=60`; a key has no stage if all stages have the same value."""
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
                value = result.protocol.rsplit("; seed", 1)[0]  # seeds of one design have different splits
            if not key.startswith(_NO_DESIGN):
                values[f"{stage}.{key}"] = str(value)
    return values
