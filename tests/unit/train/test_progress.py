"""The bar shows where the run is, also after it went back."""

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
