"""A table in the four forms that people use: HTML (made by the page's template), Markdown, CSV and LaTeX."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.files import replace_text

_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "–": "--", "→": r"$\rightarrow$", "×": r"$\times$",
    "Δ": r"$\Delta$", "<": "$<$", ">": "$>$", "≥": r"$\geq$", "≤": r"$\leq$", "α": r"$\alpha$", "²": r"$^2$",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of texts.

    Attributes:
        name: Stem of the files.
        title: Heading.
        header: One text per column.
        rows: Cells as they are printed; the first column names the row.
        note: Text below the table.
    """

    name: str
    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def markdown(self) -> str:
        """Return the table, with its note, as Markdown."""

        def line(cells: Sequence[str]) -> str:
            return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

        rule = "|---|" + "---:|" * (len(self.header) - 1)
        lines = [line(self.header), rule, *(line(row) for row in self.rows)]
        return "\n".join(lines) + ("\n\n" + self.note if self.note else "") + "\n"

    def csv(self) -> str:
        """Return the table as CSV, without its note."""
        out = io.StringIO(newline="")
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(self.header)
        writer.writerows(self.rows)
        return out.getvalue()

    def latex(self) -> str:
        """Return a LaTeX tabular for the booktabs package."""
        lines = [r"\begin{tabular}{l" + "r" * (len(self.header) - 1) + "}", r"\toprule"]
        lines += [_latex_row(self.header), r"\midrule", *(_latex_row(row) for row in self.rows)]
        return "\n".join([f"% {self.title}", *lines, r"\bottomrule", r"\end{tabular}"]) + "\n"

    def write(self, folder: Path) -> None:
        """Write NAME.csv, NAME.tex and NAME.md into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(folder / f"{self.name}.csv", self.csv())
        replace_text(folder / f"{self.name}.tex", self.latex())
        replace_text(folder / f"{self.name}.md", self.markdown())


def _latex_row(cells: Sequence[str]) -> str:
    return " & ".join("".join(_LATEX.get(letter, letter) for letter in cell) for cell in cells) + r" \\"
