"""Whatever `run_stage` is given, a wrong value ends in an error of ours with a sentence, before a process is started."""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ConfigError, EnvironmentProblem, PipelineError
from pipeline.notebook import run_stage
from tests.conftest import ROOT

SMOKE = ROOT / "configs/arm/smoke.yaml"
CIRCLE: dict[str, Any] = {}
CIRCLE["a"] = CIRCLE
DEEP: dict[str, Any] = {}
inner = DEEP
for _ in range(5000):
    inner["a"] = inner = {}


@pytest.mark.parametrize("stage", ["x", "", "--help", None, 5, ["arm"]])
def test_a_stage_that_is_none(stage: Any) -> None:
    with pytest.raises(ConfigError, match=r"unknown stage .*known: "):
        run_stage(stage, SMOKE)


@pytest.mark.parametrize(
    "config",
    [
        None,
        5,
        b"x",
        [1],
        {},
        CIRCLE,
        DEEP,
        {(1, 2): 3},
        {1: 2, None: 3},
        {"optim": {"lr": float("nan")}},
        {"run": object()},
    ],
)
def test_a_config_that_is_none(config: Any) -> None:
    with pytest.raises(ConfigError) as refused:
        run_stage("arm", config)
    assert len(str(refused.value)) < 2000


@pytest.mark.parametrize(
    "name", ["none", "folder", "fifo", "loop", "bytes", "empty", "a\0b", "\ud800", "x" * 5000, "/dev/zero"]
)
def test_a_file_that_is_no_config(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\0")
    (tmp_path / "empty").touch()
    with pytest.raises(ConfigError):
        run_stage("arm", f"{tmp_path}/{name}" if not name.startswith("/") else name)


@pytest.mark.parametrize(
    "overrides",
    [
        ["--help"],
        ["--replay", "x", "1"],
        [None],
        [5],
        5,
        None,
        {"a=b": 1},
        {None: 1},
        {"a": CIRCLE},
        {"optim.lr": object()},
        ["run.experiment=a\0b"],
        ["run.experiment=\ud800"],
        ["run.experiment=a\nb"],
        ["x=" + "x" * 3_000_000],
        "optim.lrr=1",
    ],
)
def test_overrides_that_are_none(overrides: Any) -> None:
    with pytest.raises(ConfigError) as refused:
        run_stage("arm", SMOKE, overrides)
    assert len(str(refused.value)) < 2000


def test_a_machine_on_which_no_stage_can_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
        with pytest.raises(EnvironmentProblem, match=r"cannot be started from here .* set TMPDIR"):
            run_stage("arm", SMOKE)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(PipelineError, match="stage arm cannot be started from here"):
        run_stage("arm", SMOKE)
