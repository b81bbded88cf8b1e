"""Tables in all their forms, and what a report makes of plans and incidents."""

import csv
import json
from pathlib import Path

import pytest

from pipeline.identity import flatten
from pipeline.report import sections
from pipeline.report.ablation import designs_of, differences
from pipeline.report.extras import Section, read_section, write_section
from pipeline.report.figures import draw, lines
from pipeline.report.results import read_result
from pipeline.report.tables import Table

TABLE = Table(name="t", title="T", header=["", "a|b", "Δ %"], rows=[["x_1 & y", "1.0 ± 0.2", "50 %"], ["z", "–", ""]])


def test_a_table_keeps_its_cells_in_every_form() -> None:
    assert list(csv.reader(TABLE.csv().splitlines())) == [list(TABLE.header), *map(list, TABLE.rows)]
    assert TABLE.markdown().splitlines()[0] == "|  | a\\|b | Δ % |"
    latex = TABLE.latex()
    assert r"x\_1 \& y & 1.0 $\pm$ 0.2 & 50 \% \\" in latex
    assert latex.count(r"\\") == 3


def test_a_section_survives_its_folder(tmp_path: Path) -> None:
    figure = draw(tmp_path / "figures", "f", "F", lines({"a": [([1.0, 2.0], [3.0, 4.0])]}, "x", "y"))
    write_section(tmp_path, Section("S", [TABLE], [figure]))
    again = read_section(tmp_path)
    assert again.title == "S"
    assert again.figures == [figure]
    assert again.tables[0].csv() == TABLE.csv()


def test_a_figure_has_the_pages_colour_and_is_black_in_print(tmp_path: Path) -> None:
    figure = draw(tmp_path, "f", "F", lines({"a": [([1.0], [3.0])]}, "x", "y"))
    assert "currentColor" in figure.svg
    assert "currentColor" not in (tmp_path / "f.svg").read_text()
    assert (tmp_path / "f.pdf").read_bytes().startswith(b"%PDF")
    again = draw(tmp_path, "f", "F", lines({"a": [([1.0], [3.0])]}, "x", "y"))
    assert again == figure


def stage(folder: Path, *, lr: float, seed: int) -> None:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        f"run: {{experiment: {folder.parent.name}, seed: {seed}}}\noptim: {{lr: {lr}}}\n"
    )
    rows = [{"step": s, "samples": 8 * s, "perf/step_seconds": 0.5, "train/loss": 1.0 / s} for s in (10, 20)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 3')


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for name, lr, seed in (("a", 1e-3, 0), ("b", 1e-3, 1), ("c", 1e-2, 0)):
        stage(tmp_path / name / "distill", lr=lr, seed=seed)
    return tmp_path


def test_seeds_are_one_design_and_another_value_is_another(runs: Path) -> None:
    designs = designs_of([read_result(runs / name) for name in "abc"])
    assert [[r.name for r in d.results] for d in designs] == [["a", "b"], ["c"]]
    assert differences(designs) == [{"distill.optim.lr": "0.001"}, {"distill.optim.lr": "0.01"}]


def test_half_a_line_of_a_running_log_is_left_out_and_time_is_summed(runs: Path) -> None:
    run = read_result(runs / "a").stages["distill"]
    assert run.curve("train/loss") == ([10, 20], [0.1, 0.05])
    assert run.seconds() == pytest.approx(10.0)


def test_a_plan_is_compared_with_the_run(runs: Path) -> None:
    plan = {"stages": [{"stage": "distill", "steps": 20, "samples": 160, "hours": 20 / 3600, "note": "words"}]}
    (runs / "a" / "plan.json").write_text(json.dumps(plan))
    (table,) = sections.plans([read_result(runs / "a")])
    assert [row[-1] for row in table.rows] == ["1.00", "1.00", "0.50"]
    (runs / "a" / "distill" / "environment.json").write_text('{"config_sha256": "of a config that was not planned"}')
    assert sections.plans([read_result(runs / "a")]) == []


def test_incidents_and_incomplete_stages_are_listed(runs: Path) -> None:
    (runs / "a" / "distill" / "incidents.jsonl").write_text('{"step": 7, "reason": "loss is nan", "data_step": 6}\n')
    (runs / "a" / "distill" / "status.json").write_text('{"state": "interrupted", "step": 20}')
    (table,) = sections.incidents([read_result(runs / "a")])
    assert [row[1] for row in table.rows] == ["7", "20"]
    assert sections.incidents([read_result(runs / "b")]) == []


def test_flatten_names_the_leaves() -> None:
    assert flatten({"a": {"b": 1, "c": {"d": [2]}}, "e": None}) == {"a.b": 1, "a.c.d": [2], "e": None}
