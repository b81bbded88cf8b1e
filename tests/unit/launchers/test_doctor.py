"""The doctor tries things; a healthy machine passes, and what is missing comes with its remedy."""

import sys
from pathlib import Path

import pytest

from launchers import doctor, filesystem
from launchers.chain import read_steps
from tests import warm


def test_here_all_that_is_needed_is_well(digits: Path, tmp_path: Path) -> None:
    overrides = [f"run.root={tmp_path}", f"data.train={digits / 'train'}", f"data.split={digits / 'split.json'}"]
    command = [sys.executable, "-m", "launchers", "doctor", "chain", "smoke", *overrides]
    done = warm.run(command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PROBLEM" not in done.stdout
    assert "OK       two processes sum a tensor over gloo" in done.stdout
    assert "OK       scan on cpu: torch" in done.stdout


def test_renames_are_atomic_here(tmp_path: Path) -> None:
    assert filesystem.renames_seen_halfway(tmp_path) == 0


def test_a_file_system_that_renames_by_copying_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What some user-space file systems do: the target is cut, then filled."""
    monkeypatch.setattr(filesystem.os, "replace", lambda a, b: Path(b).write_bytes(Path(a).read_bytes()))
    assert filesystem.renames_seen_halfway(tmp_path) > 0


def test_missing_data_and_weights_are_named_with_what_to_do(digits: Path) -> None:
    data = [f"data.train={digits / 'train'}", "data.split=null", "init_from=null"]
    teacher = "teacher={timm: regnety_160, weights: nowhere.safetensors}"
    found = list(doctor.data(read_steps("distill", "configs/distill/smoke.yaml", [*data, teacher])))
    assert [bool(finding.remedy) for finding in found] == [False, True]
    assert "nothing is downloaded" in found[1].remedy
    found = list(doctor.data(read_steps("arm", "configs/arm/smoke.yaml", ["data.train=nowhere"])))
    assert "python -m pipeline.data convert" in found[0].remedy
