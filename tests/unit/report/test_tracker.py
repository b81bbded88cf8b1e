"""Trackers in their offline modes, read back from their own stores. A library that is not installed skips its tests."""

import json
import logging
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import EnvironmentProblem
from pipeline.identity import identity
from pipeline.report import tracker as tracker_module
from pipeline.report.tracker import Row, RunEnd, Tracker, TrackerName, check_installed
from tests.unit.train.test_run import config_of

Points = dict[str, list[tuple[int, float]]]
CONFIG = {"optim.lr": 0.5, "run.experiment": "exp", "data.test": None, "note": "x" * 7000}
NAMES: tuple[TrackerName, ...] = ("wandb", "mlflow", "trackio")
BLOCK = 32 * 1024  # bytes of a block in LevelDB's log format, in which W&B writes

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries warn of their own future


def wandb_points(folder: Path) -> tuple[Points, dict[str, Any]]:
    from wandb.proto.wandb_internal_pb2 import Record

    points: Points = defaultdict(list)
    config: dict[str, Any] = {}
    files = sorted((folder / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    assert len({path.name for path in files}) == 1, "all starts are one run"
    for path in files:
        for content in leveldb_records(path.read_bytes()[7:]):
            record = Record.FromString(content)
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            for name in row.keys() - {"_step", "_timestamp", "_runtime"}:
                points[name].append((row.get("_step", record.history.step.num), row[name]))
    return points, config


def leveldb_records(data: bytes) -> Iterator[bytes]:
    """The records of a log: blocks of 32 KiB (the file's 7 bytes of header count) with (checksum 4, length 2, type 1)."""
    at, whole = 0, b""
    while at + 7 <= len(data):
        left = BLOCK - (at + 7) % BLOCK
        if left < 7:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield whole
            whole = b""


def mlflow_points(folder: Path) -> tuple[Points, dict[str, Any]]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=(folder.parent.parent / "mlruns").as_uri())
    experiment = client.get_experiment_by_name(folder.parent.name)
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.info.run_name == folder.name
    names = run.data.metrics
    history = {name: client.get_metric_history(run.info.run_id, name) for name in names}
    return {name: [(m.step, m.value) for m in found] for name, found in history.items()}, run.data.params


def trackio_points(folder: Path) -> tuple[Points, dict[str, Any]]:
    from trackio.sqlite_storage import SQLiteStorage

    project = folder.parent.name
    (run,) = SQLiteStorage.get_runs(project)
    points: Points = defaultdict(list)
    for row in SQLiteStorage.get_logs(project, run):
        for name in row.keys() - {"step", "timestamp"}:
            points[name].append((row["step"], row[name]))
    return points, SQLiteStorage.get_run_config(project, run) or {}


READ: dict[str, Callable[[Path], tuple[Points, dict[str, Any]]]] = {
    "wandb": wandb_points,
    "mlflow": mlflow_points,
    "trackio": trackio_points,
}


def use_trackio_of(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read and write the database below `root`: trackio decides where it is when it is imported."""
    monkeypatch.setenv("TRACKIO_DIR", str(root / "trackio"))
    for module in [name for name in sys.modules if name.split(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, module)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("WANDB_MODE", "WANDB_PROJECT", "MLFLOW_TRACKING_URI", "MLFLOW_ALLOW_FILE_STORE"):
        monkeypatch.delenv(name, raising=False)
    use_trackio_of(tmp_path, monkeypatch)
    run = tmp_path / "exp" / "arm"
    run.mkdir(parents=True)
    return run


def rows(steps: range) -> list[dict[str, float]]:
    """What a run logs: a row for each step, and a second one at every fourth."""
    found: list[dict[str, float]] = []
    for step in steps:
        found.append({"train/loss": 1 / step, "step": step, "samples": 8.0 * step})
        if step % 4 == 0:
            found.append({"val/top1": 10.0 * step, "step": step, "samples": 8.0 * step})
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_resumes_twice_has_every_point_once(name: TrackerName, folder: Path) -> None:
    pytest.importorskip(name, reason=f"pip install 'visionmamba-pipeline[{name}]'")
    for steps, end in ((range(1, 8), "interrupted"), (range(5, 11), "failed"), (range(9, 17), "complete")):
        tracker = Tracker(name, folder, CONFIG)
        for row in rows(steps):
            tracker.send(row)
        tracker.close(end)
    points, config = READ[name](folder)
    assert sorted(points["train/loss"]) == [(step, pytest.approx(1 / step)) for step in range(1, 17)]
    assert sorted(points["val/top1"]) == [(step, 10.0 * step) for step in (4, 8, 12, 16)]
    assert sorted(points["samples"]) == [(step, 8.0 * step) for step in range(1, 17)]
    assert str(config["optim.lr"]) == "0.5"
    assert config["run.experiment"] == "exp"


@pytest.mark.parametrize("name", NAMES)
def test_rows_from_before_the_tracker_was_chosen_are_sent(name: TrackerName, folder: Path) -> None:
    pytest.importorskip(name, reason=f"pip install 'visionmamba-pipeline[{name}]'")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(range(1, 6))))
    (folder / "tracker.json").write_text('{"tracker": "none", "sent": 7')
    tracker = Tracker(name, folder, CONFIG)
    for row in rows(range(6, 9)):
        tracker.send(row)
    tracker.close("complete")
    points, _ = READ[name](folder)
    assert sorted(points["train/loss"]) == [(step, pytest.approx(1 / step)) for step in range(1, 9)]
    assert sorted(points["val/top1"]) == [(4, 40.0), (8, 80.0)]


def test_a_store_that_fails_later_stops_no_training(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("mlflow", reason="pip install 'visionmamba-pipeline[mlflow]'")
    tracker = Tracker("mlflow", folder, CONFIG)
    store = folder.parent.parent / "mlruns"
    store.rename(store.with_name("gone"))
    with caplog.at_level(logging.WARNING):
        for row in rows(range(1, 4)):
            tracker.send(row)
    tracker.close("complete")
    assert [r.getMessage().startswith("run.tracker=mlflow is given up (") for r in caplog.records] == [True]


def test_a_store_that_does_not_start_is_a_sentence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="pip install 'visionmamba-pipeline[mlflow]'")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nothing://here")
    with pytest.raises(EnvironmentProblem, match=r"run\.tracker=mlflow does not start"):
        Tracker("mlflow", folder, CONFIG)


class Memory:
    """A store in memory, for what no library decides."""

    def __init__(self, folder: Path, before: str | None, config: Mapping[str, Any]) -> None:
        self.id, self.rows = before or "new", list[tuple[int, dict[str, float]]]()

    def log(self, row: Row, step: int) -> None:
        self.rows.append((step, dict(row)))

    def close(self, end: RunEnd) -> None: ...


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker_module, "_LIBRARIES", {"wandb": tracker_module._Library("json", Memory)})


@pytest.mark.parametrize(
    "note",
    [
        {"id": "../../x"},
        {"id": "a/b"},
        {"id": ".."},
        {"id": ""},
        {"id": "a\0b"},
        {"id": "a\n"},
        {"id": "x" * 5000},
        {"id": ["known"]},
        {"id": 5},
        {"id": None},
        {"sent": {"train/loss": "x"}},
        {"sent": {"train/loss": None}},
        {"sent": {"train/loss": 1e999}},
        {"sent": {"train/loss": -1}},
        {"sent": [1]},
        {"tracker": "mlflow"},
        {"tracker": 7},
    ],
)
@pytest.mark.usefixtures("memory")
def test_a_damaged_or_hostile_note_begins_a_new_run(folder: Path, note: dict[str, Any]) -> None:
    """A library may make a file of the id, so it is a plain name; what was sent are counts."""
    sound = {"tracker": "wandb", "id": "known", "sent": {"train/loss": 3, "samples": 3}}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(range(1, 4))))
    for values, steps in ((sound, []), (sound | note, [1, 2, 3])):
        (folder / "tracker.json").write_text(json.dumps(values))
        store = Tracker("wandb", folder, CONFIG)._client
        assert isinstance(store, Memory)
        assert [step for step, _ in store.rows] == steps
        assert store.id == ("new" if steps else "known")


@pytest.mark.usefixtures("memory")
def test_a_note_that_cannot_be_written_stops_no_training(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = Tracker("wandb", folder, CONFIG)
    folder.rename(folder.with_name("gone"))
    folder.write_text("")
    with caplog.at_level(logging.WARNING):
        for row in rows(range(1, 4)):
            tracker.send(row)
    tracker.close("complete")
    assert [r.getMessage().startswith("run.tracker=wandb is given up (") for r in caplog.records] == [True]


@pytest.mark.parametrize("name", NAMES)
def test_a_store_that_cannot_be_written_is_a_sentence(
    name: TrackerName, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(name, reason=f"pip install 'visionmamba-pipeline[{name}]'")
    for variable in ("WANDB_DIR", "TRACKIO_DIR"):
        monkeypatch.delenv(variable, raising=False)
    for store in (folder / "wandb", folder.parent.parent / "mlruns", folder.parent.parent / "trackio"):
        store.write_text("")
    with pytest.raises(EnvironmentProblem, match=rf"run\.tracker={name} does not start"):
        Tracker(name, folder, CONFIG)


def test_a_server_that_is_away_is_a_sentence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow's own patience, seven attempts of two minutes, is not waited for."""
    pytest.importorskip("mlflow", reason="pip install 'visionmamba-pipeline[mlflow]'")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(EnvironmentProblem, match=r"run\.tracker=mlflow does not start"):
        Tracker("mlflow", folder, CONFIG)
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "2"


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_library_is_a_sentence_with_the_command(name: TrackerName, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(EnvironmentProblem, match=rf"pip install 'visionmamba-pipeline\[{name}\]'.*run.tracker=none"):
        check_installed(name)
    check_installed("none")


def test_the_tracker_is_no_part_of_the_identity_of_a_run() -> None:
    config = config_of("arm")
    other = config.model_copy(update={"run": config.run.model_copy(update={"tracker": "mlflow"})})
    assert identity(other) == identity(config)
