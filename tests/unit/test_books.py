"""The small files of a run: what is damaged in them counts as absent."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from launchers.__main__ import main as launchers
from pipeline.books import read_config, read_status
from pipeline.errors import DataError
from pipeline.evaluate.predictions import Predictions
from pipeline.report.extras import read_section
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


def evaluation(**more) -> dict:
    scores = {
        "top1": 50.0,
        "ece": 1.0,
        "samples": 4,
        "per_class": {"a": 50.0, "b": None},
        "confusion": [[1, 1], [0, 2]],
    }
    return {"protocol": "p", "split": None, "models": {"student": scores | more}}


@pytest.mark.parametrize(
    "more",
    [
        {"confusion": [[1, 1]]},
        {"confusion": [[1, 1], [0, {}]]},
        {"per_class": {"a": "x", "b": 1.0}},
        {"per_class": {"a": 1.0}},
        {"groups": {"tail": ["c"]}},
        {"intervals": {"top1": [1.0]}},
        {"top1": None},
        {"samples": -1},
        {"ece": 10**18},
    ],
)
def test_an_evaluation_that_contradicts_itself_counts_as_absent(tmp_path: Path, more: dict) -> None:
    run = tmp_path / "x" / "distill"
    run.mkdir(parents=True)
    (run / "evaluation.json").write_text(json.dumps(evaluation()))
    assert read_result(tmp_path / "x").models["stage 2"]["top1"] == 50.0
    (run / "evaluation.json").write_text(json.dumps(evaluation(**more)))
    assert read_result(tmp_path / "x").models == {}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("x/plan.json", '{"stages": [{"stage": 5}]}'),
        ("x/plan.json", '{"stages": {"arm": 1}}'),
        ("x/data-check.json", '{"findings": [{"text": []}]}'),
        ("x/folds.json", '{"sentence": {}}'),
        ("x/arm/metrics.jsonl", '{"step": 1, "train/loss": "high"}\n{"step": -1}\n{"step": 1e999}\n'),
        ("x/arm/metrics.jsonl", '{"step": 1, "samples": ' + "9" * 400 + "}\n"),
        ("x/arm/config.yaml", "data: {train: {a: b}}"),
        ("x/arm/config.yaml", "data: {train: a, classes: [1]}"),
        ("x/arm/config.yaml", "run: {seed: x}\ndata: [1]"),
        ("x/arm/config.yaml", "a: &a [1]\nb: *a"),
        ("x/arm/environment.json", '{"command": "\\ud800"}'),
        ("x/arm/export/model.json", '{"model": 5}'),
        ("x/slurm/arm.json", '{"job": "../../x", "logs": "/", "cluster": {}}'),
    ],
)
def test_books_of_another_form_count_as_absent(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / "x" / "arm").mkdir(parents=True)
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(text)
    (tmp_path / "x" / "arm" / "status.json").write_text('{"state": "running"}')
    found = read_result(tmp_path / "x")
    arm = found.stages["arm"]
    assert (arm.rows, arm.config, arm.environment, arm.plan, arm.card, found.data_findings) == ([], {}, {}, {}, {}, [])
    assert launchers(["status", "--root", str(tmp_path)]) == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-30]),
        lambda path: path.write_bytes(b""),
        lambda path: np.savez(path, labels=np.zeros(3)),
        lambda path: np.savez(path, **(dict(np.load(path)) | {"labels": np.zeros((2, 2), int)})),
        lambda path: np.savez(path, **(dict(np.load(path)) | {"predicted": np.array([0, 9])})),
        lambda path: np.savez(path, **(dict(np.load(path)) | {"loss": np.array(["a", "b"])})),
        lambda path: np.savez(path, **(dict(np.load(path)) | {"loss": np.array([np.nan, 1])})),
    ],
)
def test_damaged_predictions_are_refused(tmp_path: Path, change) -> None:
    whole, half = np.array([0, 1]), np.array([0.5, 0.5])
    names = ("sample_indices", "labels", "predicted", "label_rank")
    Predictions(**dict.fromkeys(names, whole), confidence=half, loss=half).save(tmp_path / "p.npz")
    assert Predictions.load(tmp_path / "p.npz", 2).labels.tolist() == [0, 1]
    change(tmp_path / "p.npz")
    with pytest.raises(DataError, match="evaluate the model again"):
        Predictions.load(tmp_path / "p.npz", 2)


@pytest.mark.parametrize(
    "text", ["[]", '{"title": 5, "tables": [], "figures": []}', '{"title": "a", "tables": [{}]}', "{"]
)
def test_a_damaged_section_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "section.json").write_text(text)
    with pytest.raises(DataError, match="is damaged"):
        read_section(tmp_path)


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
