"""The small files of a run: what is damaged in them counts as absent."""

import json
import logging
from pathlib import Path

import pytest

from launchers.__main__ import main as launchers
from pipeline.books import read_config, read_status
from pipeline.report.results import read_result

DAMAGED = {
    "empty": b"",
    "cut": b"{",
    "a list": b"[]",
    "no UTF-8": b"\xff",
    "no time": b'{"state": 5}',
    "time in words": b'{"state": "running", "time": "x"}',
    "infinite": b'{"state": "running", "time": 1e400}',
    "before all time": b'{"state": "running", "time": -1e300, "step": "a", "steps": 0}',
    "deep": b"[" * 99_999,
    "reason": b'{"state": "failed", "reason": {}}',
    "null": b"null",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_books_of_a_run_do_not_end_its_status_or_its_report(tmp_path: Path, name: str, caplog) -> None:
    run = tmp_path / "x" / "arm"
    run.mkdir(parents=True)
    for file in (
        "status.json",
        "config.yaml",
        "environment.json",
        "evaluation.json",
        "metrics.jsonl",
        "incidents.jsonl",
    ):
        (run / file).write_bytes(DAMAGED[name])
    with caplog.at_level(logging.WARNING):
        assert read_status(run) == {}
    assert "status.json is damaged" in caplog.text or name == "null"
    assert launchers(["status", "--root", str(tmp_path)]) == 0
    found = read_result(tmp_path / "x").stages["arm"]
    assert (found.rows, found.status) == ([], {})


def test_rows_without_a_step_are_left_out(tmp_path: Path) -> None:
    run = tmp_path / "x" / "arm"
    run.mkdir(parents=True)
    rows = [{"step": "a"}, [1], {"step": 1, "train/loss": 2.0}, {"step": 2, "samples": 8}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_result(tmp_path / "x").stages["arm"].rows == rows[2:]


def test_what_is_sound_is_read(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text('{"state": "running", "time": 5.0, "step": 1, "steps": 2}')
    (tmp_path / "config.yaml").write_text("run: {seed: 1}")
    assert read_status(tmp_path) == {"state": "running", "time": 5.0, "step": 1, "steps": 2, "reason": ""}
    assert read_config(tmp_path) == {"run": {"seed": 1}}
