"""The bar shows where the run is, also after it went back."""

import logging
import sys

import pytest

from pipeline.train.progress import Progress


def test_a_rewind_sets_the_bar_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    progress = Progress("run", done=10, total=50, shown=True)
    for _ in range(5):
        progress.advance()
    progress.rewind(6)
    progress.advance()
    assert progress._bar is not None
    assert (progress._bar.n, progress._bar.initial) == (7, 6)
    progress.close()


def test_a_row_without_numbers_for_people_is_no_line(caplog: pytest.LogCaptureFixture) -> None:
    progress = Progress("run", done=0, total=50, shown=True)
    with caplog.at_level(logging.INFO):
        progress.line(5, {"val/images": 0.0})
        progress.line(10, {"train/loss": 0.5})
    assert [record.getMessage() for record in caplog.records] == ["run step 10/50  loss 0.5  eta 0:00:00"]
