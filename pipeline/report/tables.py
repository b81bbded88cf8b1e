"""A table once, in the four forms that people paste: HTML (by the template), Markdown, CSV, LaTeX."""

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
    """Cells are texts as they are to be read; the first column names the row."""

    name: str  # of the files
    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def markdown(self) -> str:
        def line(cells: Sequence[str]) -> str:
            return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

        rule = "|---|" + "---:|" * (len(self.header) - 1)
        lines = [line(self.header), rule, *(line(row) for row in self.rows)]
        return "\n".join(lines) + ("\n\n" + self.note if self.note else "") + "\n"

    def csv(self) -> str:
        out = io.StringIO(newline="")
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(self.header)
        writer.writerows(self.rows)
        return out.getvalue()

    def latex(self) -> str:
        """For booktabs."""
        lines = [r"\begin{tabular}{l" + "r" * (len(self.header) - 1) + "}", r"\toprule"]
        lines += [_latex_row(self.header), r"\midrule", *(_latex_row(row) for row in self.rows)]
        return "\n".join([f"% {self.title}", *lines, r"\bottomrule", r"\end{tabular}"]) + "\n"

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(folder / f"{self.name}.csv", self.csv())
        replace_text(folder / f"{self.name}.tex", self.latex())
        replace_text(folder / f"{self.name}.md", self.markdown())


def _latex_row(cells: Sequence[str]) -> str:
    return " & ".join("".join(_LATEX.get(letter, letter) for letter in cell) for cell in cells) + r" \\"
