"""Files with one JSON object a line."""

from pathlib import Path

import pytest

from pipeline.jsonl import newest, read_rows


def test_a_last_line_that_a_kill_has_cut_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "val/top1": 50.0}\n{"step": 2}\n{"step": 3, "val/to')
    assert read_rows(path) == [{"step": 1, "val/top1": 50.0}, {"step": 2}]


def test_a_file_that_does_not_exist_yet_has_no_rows(tmp_path: Path) -> None:
    assert read_rows(tmp_path / "metrics.jsonl") == []


def test_newest_is_the_last_row_that_has_the_name() -> None:
    rows = [{"step": 1, "val/top1": 50.0}, {"step": 2, "val/top1": 60.0}, {"step": 3}]
    assert newest(rows, "val/top1") == 60.0
    assert newest(rows, "val/tail") is None


def test_a_damaged_line_is_left_out_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\xff\x00{\n[2]\n{"step": 3}\n')
    assert read_rows(path) == [{"step": 1}, {"step": 3}]
    assert "2 damaged lines are left out" in caplog.text
