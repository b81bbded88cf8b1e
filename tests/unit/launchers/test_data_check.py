"""A chain looks at its data before stage 1, says what it found in a few lines, and goes on."""

import json
from pathlib import Path

import pytest

from launchers import data_check
from launchers.chain import Step, read_steps
from pipeline.report.page import write_report


def steps_on(digits: Path, runs: Path, test: str) -> list[Step]:
    data = [f"data.train={digits / 'train'}", f"data.test={digits / test}", f"data.split={digits / 'split.json'}"]
    return read_steps("chain", "smoke", [f"run.root={runs}", *data])


def test_test_images_in_training_are_told_kept_and_shown_by_the_report(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data_check.run(steps_on(digits, tmp_path, "train"))
    told = capsys.readouterr().err
    assert "WARNING: Test images in the training set: 1,397 images of" in told
    assert "Classes with fewer than 5 labels" in told
    assert len(told.splitlines()) <= 5
    experiment = tmp_path / "smoke"
    kept = json.loads((experiment / "data-check.json").read_text())["findings"]
    assert [(finding["name"], finding["level"]) for finding in kept] == [
        ("test-in-training", "grave"),
        ("few-labels", "warning"),
    ]
    (experiment / "arm").mkdir()
    page = write_report([experiment], experiment / "report.html")
    for file in (page, experiment / "report" / "report.md"):
        assert "Test images in the training set" in file.read_text()


def test_a_clean_test_set_is_not_spoken_of(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data_check.run(steps_on(digits, tmp_path, "test"))
    assert "Test images" not in capsys.readouterr().err


def test_data_that_cannot_be_read_stops_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data_check.run(steps_on(tmp_path / "none", tmp_path, "test"))
    assert "the data was not checked" in capsys.readouterr().err
    assert not (tmp_path / "smoke").exists()
