"""What the cells of the scoreboard add up to: one table, one figure, one document, one JSON object.

A cell is one data set under one regime. A gain is a mean over the seeds that both columns have, so that every comparison is
paired. What is missing is said and never filled in.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from pipeline.errors import DataError
from pipeline.files import replace_text
from pipeline.jsonl import read_rows
from pipeline.report.figures import COLOURS, Paint, draw
from pipeline.report.recommend import Candidate, recommend
from pipeline.report.tables import Table
from pipeline.report.worth import COMPUTED
from studies.scoreboard.columns import OURS, TITLES, Cell
from studies.scoreboard.pictures import REGIMES

# The mean of the classes, since validation images are balanced and test images of a folder may not be.
ACCURACY = "balanced"
MANY_LABELS = 200  # from here on the bound of the calibration error holds


class Place(NamedTuple):
    """Where a cell is on the board."""

    pictures: str
    regime: str
    seed: int

    @property
    def name(self) -> str:
        """Name of its experiments."""
        return f"{self.pictures}-{self.regime}-seed{self.seed}"


class Board:
    """The cells of a folder.

    Args:
        folder: Where the cells are.
        places: The cells that are asked for, whether they are there or not.
    """

    def __init__(self, folder: Path, places: Sequence[Place]) -> None:
        self.folder, self.places = folder, list(places)
        self.cells = {place: {c: cell for c in TITLES if (cell := self.read(place, c))} for place in self.places}
        for place in self.places:
            self._recommend(place)

    def _recommend(self, place: Place) -> None:
        """Fill the column `recommended`: what the report of the chain advises to use, chosen on the validation images."""
        found = self.cells[place]
        if not all(column in found for column in ("chain", "stage-2", *COMPUTED)):
            return
        validated = {column: found[column].get("validated") for column in ("chain", "stage-2", *COMPUTED)}
        candidates = [Candidate(column, value) for column, value in validated.items() if value is not None]
        chosen = "chain"
        if candidates and candidates[0].title == "chain":
            chosen = recommend(candidates, found["chain"]["validation"]).title
        found["recommended"] = found[chosen] | {"setting": chosen}

    def file(self, place: Place, column: str) -> Path:
        """The file of one cell and column."""
        return self.folder / place.pictures / place.regime / f"seed{place.seed}" / f"{column}.json"

    def read(self, place: Place, column: str) -> Cell | None:
        """Read one cell and column; None if it is not there."""
        path = self.file(place, column)
        return json.loads(path.read_text()) if path.is_file() else None

    def write(self, place: Place, column: str, cell: Cell) -> None:
        """Write one cell and column."""
        path = self.file(place, column)
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(cell, indent=1) + "\n")
        self.cells[place][column] = cell
        self._recommend(place)

    def lines(self) -> list[dict[str, Any]]:
        """All cells as they were measured: a line for each place and column."""
        return [
            {**place._asdict(), "column": column, **cell}
            for place, cells in self.cells.items()
            for column, cell in cells.items()
            if column != "recommended"
        ]

    def adopt(self, path: Path) -> int:
        """Take the cells of another board, of its `.jsonl` file, where all columns of a place are there and none is here.

        A place that was only begun elsewhere is measured anew, since its rivals start from the runs of its chain.

        Returns:
            How many places were taken.

        Raises:
            DataError: The file is not there, or it is no board.
        """
        found: dict[Place, dict[str, Cell]] = defaultdict(dict)
        for row in read_rows(path):
            if not {*Place._fields, "column", ACCURACY} <= row.keys():
                raise DataError(f"{path}: a line is no cell of a scoreboard; give the .jsonl beside its document")
            place = Place(*(row.pop(key) for key in Place._fields))
            found[place][row.pop("column")] = row
        if not found:
            raise DataError(f"{path}: there are no cells of a scoreboard; give the .jsonl beside its document")
        every = set(TITLES) - {"recommended"}
        taken = [place for place in self.places if not self.cells[place] and set(found[place]) == every]
        for place in taken:
            for column, cell in found[place].items():
                self.write(place, column, cell)
        return len(taken)

    def rows(self) -> list[tuple[str, str]]:
        """Data sets and regimes, in the order asked for."""
        return list(dict.fromkeys((place.pictures, place.regime) for place in self.places))

    def begun(self) -> list[tuple[str, str]]:
        """Those of `rows` that have at least one number."""
        there = {(place.pictures, place.regime) for place in self.places if self.cells[place]}
        return [row for row in self.rows() if row in there]

    def values(self, row: tuple[str, str], column: str, key: str = ACCURACY) -> dict[int, float]:
        """Seed -> value of a column."""
        there = (place for place in self.places if (place.pictures, place.regime) == row)
        return {p.seed: self.cells[p][column][key] for p in there if key in self.cells[p].get(column, {})}

    def gain(self, row: tuple[str, str], column: str, over: str, key: str = ACCURACY) -> float | None:
        """Mean of a column minus another, over the seeds that both have; None if there are none."""
        mine, other = self.values(row, column, key), self.values(row, over, key)
        both = sorted(mine.keys() & other.keys())
        return fmean(mine[s] - other[s] for s in both) if both else None

    def best_baseline(self, row: tuple[str, str]) -> tuple[str, float] | None:
        """Return the baseline with the best mean in a cell, and the gain of what the chain recommends over it.

        Only seeds count that have all columns. None without one: a cell without its strongest rivals would flatter the chain.
        """
        found = {column: self.values(row, column) for column in TITLES if column not in OURS}
        mine = self.values(row, "recommended")
        seeds = set(mine).intersection(*found.values())
        if not seeds:
            return None
        means = {column: fmean(values[seed] for seed in seeds) for column, values in found.items()}
        best = max(means, key=lambda column: means[column])
        return best, fmean(mine[seed] for seed in seeds) - means[best]

    def summary(self) -> dict[str, Any]:
        """The numbers of the JSON line; None where no cell has them."""
        rows = self.rows()
        against = {row: found for row in rows if (found := self.best_baseline(row))}
        gains = [gain for _, gain in against.values()]
        third = [g for row in rows if (g := self.gain(row, "stage-3-teacher", "stage-2")) is not None]
        measured = [cells for cells in self.cells.values() if "chain" in cells and "stage-2" in cells]
        errors = [(c["chain"]["ece"], c["chain"]["labels"] >= MANY_LABELS) for c in measured]
        raised = [c["chain"]["ece"] - c["stage-2"]["ece"] for c in measured]
        complete = sum(1 for p in self.places if len(self.cells[p]) == len(TITLES))
        rounded = {
            "worst_cell_vs_best_baseline": min(gains, default=None),
            "mean_vs_best_baseline": fmean(gains) if gains else None,
            "stage3_vs_stage2": fmean(third) if third else None,
            "stage3_vs_stage2_worst": min(third, default=None),
            "ece_worst": max((ece for ece, many in errors if many), default=None),
            "ece_worst_any": max((ece for ece, _ in errors), default=None),
            "ece_over_stage2_worst": max(raised, default=None),
        }
        worst = min(against, key=lambda row: against[row][1], default=None)
        return {
            **{key: None if value is None else round(value, 2) for key, value in rounded.items()},
            "worst_cell": "/".join(worst) if worst else None,
            "cells": len(rows),
            "cells_compared": len(against),
            "places": len(self.places),
            "places_complete": complete,
            "seeds": sorted({place.seed for place in self.places}),
        }

    def table(self) -> Table:
        """The accuracies: a row for each cell."""
        shown = [column for column in TITLES if any(column in self.cells[p] for p in self.places)]
        rows = []
        for row in self.begun():
            counts = self.values(row, "chain", "labels") or self.values(row, "majority", "labels")
            best = self.best_baseline(row)
            rows.append([
                f"{row[0]}, {REGIMES[row[1]].title}",
                f"{fmean(counts.values()):.0f}" if counts else "–",
                *(_spread(list(self.values(row, column).values())) for column in shown),
                f"{best[1]:+.1f} ({TITLES[best[0]]})" if best else "–",
            ])  # fmt: skip
        return Table(
            name="scoreboard",
            title="Accuracy on the test set, mean of the classes, percent",
            header=["", "labels", *(TITLES[column] for column in shown), "recommended, over the best baseline"],
            rows=rows,
            note=f"Mean ± standard deviation over the seeds that are there ({self._missing()}). "
            "The best baseline is the one with the best mean on the test set, which favours it; it is named where all columns"
            f" are there, and compared over the seeds that they share. {self._choices()}",
        )

    def costs(self) -> Table:
        """Images seen, time and calibration: a row for each column, means over all cells."""
        rows = []
        for column, title in TITLES.items():
            found = [self.cells[p][column] for p in self.places if column in self.cells[p]]
            if found:
                errors = [cell["ece"] for cell in found if "ece" in cell]
                rows.append([
                    title, str(len(found)), f"{fmean(c['images'] for c in found):,.0f}",
                    f"{fmean(c['seconds'] for c in found):.1f}",
                    f"{fmean(errors):.1f} ({max(errors):.1f})" if errors else "–",
                ])  # fmt: skip
        return Table(
            name="costs",
            title="Cost and calibration",
            header=["", "runs", "images seen", "seconds", "ECE, mean (worst)"],
            rows=rows,
            note="Images seen count every view that a network trained on, of all stages. Seconds are one thread's, without the"
            " start, evaluations and saves; tuning counts. ECE: expected calibration error in percent.",
        )

    def _missing(self) -> str:
        rows = self.rows()
        asked = len({place.seed for place in self.places})
        lacking = [row for row in rows if any(len(self.values(row, column)) < asked for column in TITLES)]
        if not lacking:
            return f"{asked} each"
        empty = [row for row in lacking if row not in self.begun()]
        said = f"{asked} are asked for; {len(lacking)} of {len(rows)} cells are not complete"
        return said + (f", and without any number: {', '.join(map('/'.join, empty))}" if empty else "")

    def _choices(self) -> str:
        """Say what is recommended how often."""
        chosen = Counter(str(c["recommended"]["setting"]) for c in self.cells.values() if "recommended" in c)
        if not chosen:
            return ""
        return "Recommended: " + ", ".join(f"{TITLES[name]} {n} times" for name, n in chosen.most_common()) + "."

    def commits(self) -> list[str]:
        """The commits at which the chains of the board were trained."""
        found = (cells["chain"].get("commit") for cells in self.cells.values() if "chain" in cells)
        return sorted({commit for commit in found if commit})


def write_document(board: Board, path: Path, command: str, machine: str, configs: str) -> None:
    """Write the board as a Markdown page, with its figure in images/ and its cells in a `.jsonl` file beside it.

    Args:
        board: The board.
        path: The page.
        command: The command that made it.
        machine: The machine, in words.
        configs: The chain's configs, or `recipe`.
    """
    table, costs, found = board.table(), board.costs(), board.summary()
    chain = "what the recipe writes for each case" if configs == "recipe" else f"that of configs/*/{configs}.yaml"
    draw(path.parent / "images", "scoreboard", "", gains_figure(board), size=(6.4, 0.28 * len(board.begun()) + 1.2))
    commits = board.commits()
    (path.parent / "images" / "scoreboard.pdf").unlink()
    parts = [
        "# The scoreboard",
        "What `make chain` reaches on several data sets and label regimes, beside what simpler means reach with the same"
        " labels. It is made by",
        f"```\n{command}\n```",
        f"on {machine}{', its runs at commit ' + ' and '.join(commits) if commits else ''}. The chain is {chain}."
        " A run that stops continues where it was. Splits, tuning and columns are described in `studies/scoreboard/`; nothing is"
        " chosen on test images.",
        f"## {table.title}",
        table.markdown(),
        "![Gain of make chain over the best baseline of each cell](images/scoreboard.svg)",
        f"## {costs.title}",
        costs.markdown(),
        "## In short",
        f"```json\n{json.dumps(found, indent=1)}\n```",
    ]
    replace_text(path, "\n\n".join(part.strip() for part in parts) + "\n")
    replace_text(path.with_suffix(".jsonl"), "".join(json.dumps(line) + "\n" for line in board.lines()))


def gains_figure(board: Board) -> Paint:
    """Make the figure: for each cell the gain over the best baseline, a point per seed and the mean."""

    def paint(canvas: Any) -> None:
        axes = canvas.subplots()
        rows = board.begun()
        for k, row in enumerate(rows):
            best = board.best_baseline(row)
            if best is None:
                middle = axes.get_yaxis_transform()  # x as a share of the axes
                axes.text(
                    0.5, k, "not complete", fontsize=7, ha="center", va="center", color="#888888", transform=middle
                )
                continue
            mine, other = board.values(row, "recommended"), board.values(row, best[0])
            each = [mine[s] - other[s] for s in mine.keys() & other.keys()]
            axes.plot(each, [k] * len(each), "o", color=COLOURS[0], alpha=0.4, markersize=4)
            axes.plot([best[1]], [k], "D", color=COLOURS[1], markersize=6)
        axes.axvline(0, color="#888888", linewidth=1)
        axes.set_yticks(range(len(rows)), [f"{a}, {REGIMES[b].title}" for a, b in rows], fontsize=7)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set(xlabel="points of accuracy over the best baseline")

    return paint


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "–"
    return f"{fmean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")
