"""A dataset whose classes have equally many images has no head and no tail, and its report speaks of all classes."""

from pathlib import Path

import numpy as np

from pipeline.report import accuracy
from pipeline.report.results import read_result
from stages.evaluator import grouped
from tests.unit.report.test_verdict import GROUPS, experiment, predictions


def test_classes_of_one_size_are_in_no_group() -> None:
    assert grouped(np.array([7, 7, 7]), None) == {}
    found = grouped(np.array([7, 8, 9]), None)
    assert {name: classes.tolist() for name, classes in found.items()} == {"head": [2], "medium": [1], "tail": [0]}


def test_without_groups_no_table_and_no_figure_speaks_of_a_tail(tmp_path: Path) -> None:
    results = [read_result(experiment(tmp_path / "e", {}, distill=predictions(40), teacher=predictions(45)))]
    rows = ["stage 2", "stage 3, teacher"]
    table, per_class, confusions = accuracy.tables(results, rows)
    assert table.header == ["", "top1", "top5", "balanced", "ece", "nll"]
    assert "group" not in table.note
    assert len(per_class.rows) == 4
    assert (confusions.title, len(confusions.rows)) == ("Mistakes on all classes", 4)
    assert [figure.title for figure in accuracy.figures(results, rows, tmp_path)] == [
        "Accuracy of each class", "Calibration of confidence", "Predictions on all classes"
    ]  # fmt: skip
    assert not any("tail" in words for _, words in accuracy.headline(results, rows))


def test_with_groups_they_are_shown(tmp_path: Path) -> None:
    results = [read_result(experiment(tmp_path / "e", distill=predictions(40), teacher=predictions(45)))]
    table, _, confusions = accuracy.tables(results, ["stage 2"])
    assert {"head", "tail"} <= set(table.header)
    assert "medium" not in table.header
    assert (confusions.title, len(confusions.rows)) == ("Mistakes on tail classes", 2)


def test_experiments_with_and_without_groups_are_shown_without(tmp_path: Path) -> None:
    """Whichever comes first; and a first row without groups beside a last one that has them."""
    made = {"distill": predictions(40), "teacher": predictions(45)}
    plain, grouped_one = (
        read_result(experiment(tmp_path / name, groups, **made)) for name, groups in (("a", {}), ("b", GROUPS))
    )
    rows = ["stage 2", "stage 3, teacher"]
    plain.models["stage 3, teacher"] = grouped_one.models["stage 3, teacher"]
    for results in ([plain], [plain, grouped_one], [grouped_one, plain]):
        table, _, confusions = accuracy.tables(results, rows)
        assert not {"head", "tail"} & set(table.header)
        assert confusions.title == "Mistakes on all classes"
        assert len(accuracy.figures(results, rows, tmp_path)) == 3


def test_the_caption_is_that_of_the_last_rows_stage(tmp_path: Path) -> None:
    result = read_result(experiment(tmp_path / "e", distill=predictions(40), teacher=predictions(45)))
    for stage, words in (("distill", "validation images"), ("semi", "validation images (they chose the state)")):
        result.stages[stage].evaluation["evaluated_on"] = words
    rows = ["stage 2", "stage 3, teacher"]
    assert "they chose the state" in accuracy.tables([result], rows)[0].note
    assert "they chose" not in accuracy.tables([result], rows[:1])[0].note
