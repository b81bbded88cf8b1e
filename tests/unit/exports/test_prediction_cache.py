"""The cache of a teacher's predictions: computed once, through a kill, within its limits."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.errors import EnvironmentProblem, HandoverError
from pipeline.exports.prediction_cache import PredictionCache
from tests.conftest import ENVIRONMENT, ROOT

CLASSES = 7


def network(images: Tensor) -> Tensor:
    return images.flatten(1)[:, :CLASSES] * 3 - 1


def images(number: int, seed: int) -> Tensor:
    return torch.randn(number, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


def cached(folder: Path, gigabytes: float = 1.0) -> PredictionCache:
    return PredictionCache(network, folder / "predictions.sqlite", gigabytes=gigabytes)


def test_predictions_of_equal_pixels_are_computed_once_in_whatever_batch_they_come(tmp_path: Path) -> None:
    first, x = cached(tmp_path), images(6, 0)
    assert torch.equal(first(x[:4]), network(x[:4]))
    assert torch.equal(first(x[[5, 2, 2, 0]]), network(x[[5, 2, 2, 0]]))
    assert first.num_computed == 5
    second = cached(tmp_path)
    assert torch.equal(second(x.flip(0)), network(x.flip(0)))
    assert second.num_computed == 1


ENDLESS = """
import itertools, sys
from pathlib import Path
from tests.unit.exports.test_prediction_cache import cached, images
cache = cached(Path(sys.argv[1]))
for step in itertools.count():
    cache(images(64, step))
    print(step, flush=True)
"""


def test_a_second_writer_and_a_kill_leave_every_batch_whole(tmp_path: Path) -> None:
    """One process writes until it is killed in the middle, while this one writes and reads too."""
    own = cached(tmp_path)
    child = subprocess.Popen(
        [sys.executable, "-c", ENDLESS, str(tmp_path)], cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    for seed in range(10_000, 10_040):
        own(images(8, seed))
    for line in child.stdout:
        own(images(8, 20_000 + int(line)))
        if int(line) >= 40:
            break
    child.kill()
    told = int([line, *child.stdout.read().split()][-1])
    child.wait()
    child.stdout.close()
    later = cached(tmp_path)
    for step in range(told + 1):
        assert torch.equal(later(images(64, step)), network(images(64, step)))
    for seed in [*range(10_000, 10_040), *range(20_000, 20_041)]:
        assert torch.equal(later(images(8, seed)), network(images(8, seed)))
    assert later.num_computed == 0
    assert later._database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def test_the_file_stops_at_its_limit_and_predictions_go_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    small = cached(tmp_path, gigabytes=2e-4)
    for seed in range(100):
        assert torch.equal(small(images(64, seed)), network(images(64, seed)))
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 2e5
    assert len(caplog.records) == 1
    assert "cache_gb" in caplog.text
    again = cached(tmp_path, gigabytes=2e-4)
    again(images(64, 0))
    assert again.num_computed == 0


def test_memory_does_not_grow_with_the_cache(tmp_path: Path) -> None:
    """The cache has 100 MB; memory may hold the predictions of the last call and 32 MiB of pages."""
    wide = PredictionCache(lambda x: x.flatten(1).repeat(1, 256), tmp_path / "wide.sqlite", gigabytes=1)

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    for seed in range(4):
        wide(images(128, seed))
    before = resident()
    for seed in range(4, 20):
        wide(images(128, seed))
    assert (tmp_path / "wide.sqlite").stat().st_size > 100e6
    assert resident() - before < 48e6


def test_what_is_no_cache_is_refused(tmp_path: Path) -> None:
    (tmp_path / "predictions.sqlite").write_bytes(b"something else" * 1000)
    with pytest.raises(HandoverError, match="delete it"):
        cached(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentProblem, match="cannot be opened"):
        cached(tmp_path / "file")
