"""A row of USB's study from the benchmark's files to its cell, with few steps of a small network."""

import os
from pathlib import Path

import numpy as np
import pytest

from pipeline.data import main as data
from studies.usb import ABC, Benchmark, Row, run_row, table
from tests.conftest import ENVIRONMENT, ROOT


def test_a_row_is_split_trained_from_random_weights_and_tabled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = tmp_path / "in" / "cifar-10-batches-bin"
    files.mkdir(parents=True)
    (files / "batches.meta.txt").write_text("\n".join(f"class{i}" for i in range(10)))
    generator = np.random.default_rng(0)
    for name in ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"):
        table_of = generator.integers(0, 256, (30, 3073), dtype=np.uint8)
        table_of[:, 0] = np.arange(30) % 10
        table_of.tofile(files / f"{name}.bin")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    assert data(["convert", "cifar", "in", "--out", "data/cifar10", "--processes", "1"]) == 0
    benchmark = Benchmark("cifar10", "small", 10, ("--n-1", "6", "--gamma-l", "2", "--m-1", "8", "--gamma-u=-2"))
    few = ("loop.steps=2", "loop.global_batch=4", "model.depth=10", "model.widen=1", "data.loader.workers=0")
    row = Row(benchmark, "fixmatch-abc", "usb_cifar10_fixmatch", (*ABC, *few), "59.71 ± 0.22")
    assert table([row], [0])[2] == "| small | fixmatch-abc | 59.71 ± 0.22 | - |"
    run_row(row, 0)
    shown = table([row], [0])[2]
    assert shown.startswith("| small | fixmatch-abc | 59.71 ± 0.22 | ")
    assert shown.endswith(" (one seed) |")
