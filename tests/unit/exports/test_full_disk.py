"""Exports on a disk that is full: an OSError, which every command turns into exit code 5, and nothing left behind."""

import errno
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from pipeline.cli import guarded
from pipeline.exports.tensors import write_tensors
from tests.unit.exports.test_export import exported


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_tensors_that_do_not_fit_are_an_error_of_the_system(tmp_path: Path) -> None:
    with files_of_at_most(1000), pytest.raises(OSError, match="File too large") as error:
        write_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(10_000)})
    assert error.value.errno == errno.EFBIG


@pytest.mark.parametrize("size", [1000, 20_000])
def test_an_export_on_a_full_disk_ends_in_5_and_leaves_nothing(
    tmp_path: Path, size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(_: list[str]) -> int:
        exported(tmp_path / "export")
        return 0

    with files_of_at_most(size):
        assert guarded(command, []) == 5
    assert "File too large" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
