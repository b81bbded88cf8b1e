"""Stages that run from Python end in a result or an error; the quickstart notebook is kept without outputs."""

import json
import os
import signal
import threading
from pathlib import Path

import pytest

import pipeline
from pipeline.errors import ConfigError, DataError, Interrupted
from tests.conftest import ROOT

NOTEBOOK = ROOT / "docs" / "notebooks" / "quickstart.ipynb"


def test_the_notebook_in_the_repository_has_no_outputs() -> None:
    """Outputs of one machine would change with every run."""
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells if cell["cell_type"] == "code")


def config(digits: Path, runs: Path) -> dict[str, object]:
    return {
        "run": {"experiment": "python", "root": runs},
        "data": {
            "train": digits / "train",
            "split": digits / "split.json",
            "loader": {"virtual_readers": 4, "workers": 0},
        },
        "model": {"name": "vim_nano", "embed_dim": 16, "depth": 1},
        "optim": {"lr": 1e-3},
        "loop": {"steps": 2, "global_batch": 8, "log_every": 1, "save_every": 1000},
    }


def test_a_mapping_and_a_file_are_the_same_config_and_a_finished_run_is_not_repeated(
    digits: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    result = pipeline.run_stage("distill", config(digits, tmp_path))
    assert result.folder == tmp_path / "python" / "distill"
    assert result.export == result.folder / "export"
    assert 0 <= result.metrics["val/top1"] <= 100
    assert "distill step 2/2" in capfd.readouterr().out
    written = result.folder / "config.yaml"
    before = (result.export / "model.json").stat().st_mtime_ns
    assert pipeline.run_stage("distill", written) == result
    assert (result.export / "model.json").stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match="holds a run with another config"):
        pipeline.run_stage("distill", written, {"optim.lr": 2e-3})


def test_what_ends_a_stage_is_the_exception_of_its_exit_code_with_its_sentence(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"optim\.lrr: unknown key; did you mean 'lr'"):
        pipeline.run_stage("distill", config(digits, tmp_path), ["optim.lrr=1"])
    with pytest.raises(ConfigError, match="unknown stage 'distil'"):
        pipeline.run_stage("distil", config(digits, tmp_path))
    written = tmp_path / "--help"  # a name that the stage must not take for an option
    written.write_text(json.dumps(config(digits, tmp_path), default=str))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"^stage distill: \S+/none\S* does not exist"):
        pipeline.run_stage("distill", "--help", {"data.train": tmp_path / "none"})


def test_an_interruption_lets_the_stage_save_and_the_next_call_continues(digits: Path, tmp_path: Path) -> None:
    folder, ended = tmp_path / "python" / "distill", threading.Event()

    def trains() -> bool:
        rows = folder / "metrics.jsonl"
        return rows.exists() and len(rows.read_text().splitlines()) > 2

    def interrupt_once_it_trains() -> None:
        while not trains() and not ended.wait(0.05):
            pass
        if not ended.is_set():
            os.kill(os.getpid(), signal.SIGINT)

    # A shell starts what runs in its background with SIGINT ignored, and then no Python would raise KeyboardInterrupt.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = threading.Thread(target=interrupt_once_it_trains)
    thread.start()
    try:
        with pytest.raises(Interrupted, match="all is saved, start it again to continue"):
            pipeline.run_stage("distill", config(digits, tmp_path), {"loop.steps": 3000, "data.loader.workers": 0})
    finally:
        ended.set()
        thread.join()
        signal.signal(signal.SIGINT, previous)
    (checkpoint,) = (folder / "checkpoints").glob("step_*")
    assert 0 < int(checkpoint.name.removeprefix("step_")) < 3000
    assert not (folder / "export").exists()
