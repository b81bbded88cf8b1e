"""A run's folder: who may write into it, and what a damaged file in it does."""

import json
import logging
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.errors import ConfigError, EnvironmentProblem
from pipeline.jsonl import sort_rows
from pipeline.train import run as run_module
from pipeline.train.checkpoint import _make_empty, _set_aside
from pipeline.train.distributed import start
from pipeline.train.run import Run, refuse_other_config
from tests.unit.train.test_run import config_of

CONFIG = config_of("arm")


Open = Callable[[Path], Run]


def open_run(folder: Path) -> Run:
    return Run(folder, CONFIG, start(60))


@pytest.fixture
def opened() -> Iterator[Open]:
    """Open a run as a new process would: the lock of the one before is gone."""
    runs: list[Run] = []
    handlers = logging.getLogger().handlers[:]

    def end() -> None:
        while runs:
            runs.pop()._lock.close()
        for handler in set(logging.getLogger().handlers) - set(handlers):
            logging.getLogger().removeHandler(handler)
            handler.close()

    def open_again(folder: Path) -> Run:
        end()
        runs.append(open_run(folder))
        return runs[-1]

    yield open_again
    end()


def test_a_restart_waits_for_a_dying_run_and_not_for_its_data_worker(
    tmp_path: Path, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed run and its workers live for moments longer; a restart within them is not refused."""
    fork = multiprocessing.get_context("fork")
    ready = fork.Event()

    def begin() -> None:
        run = open_run(tmp_path)
        worker = os.fork()
        if worker == 0:
            time.sleep(60)
            os._exit(0)
        (tmp_path / "worker").write_text(str(worker))
        ready.set()
        time.sleep(60)
        del run

    first = fork.Process(target=begin)
    first.start()
    try:
        assert ready.wait(60)
        with monkeypatch.context() as patched:
            patched.setattr(run_module, "LOCK_PATIENCE_SECONDS", 0.2)
            with pytest.raises(EnvironmentProblem, match="another process is working in"):
                opened(tmp_path)
        dying = threading.Timer(0.5, first.kill)  # as a rank that a kill has reached but not yet ended
        dying.start()
        opened(tmp_path)
        first.join()
        os.kill(int((tmp_path / "worker").read_text()), 0)  # it is still alive
        opened(tmp_path)
    finally:
        first.kill()
        os.kill(int((tmp_path / "worker").read_text()), 9)


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "incidents.jsonl", "log.txt", ".lock", "status.json", "heartbeat", "report", "tb"]
)
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("nowhere/x")])
def test_what_is_no_file_or_folder_of_a_run_is_set_aside(
    tmp_path: Path, name: str, make: Callable, opened: Open
) -> None:
    make(tmp_path / name)
    run = opened(tmp_path)
    run.append_metrics({"step": 1})
    run.status("running")
    run.beat()
    run.truncate_metrics(0)
    assert len(list(tmp_path.glob(f"{name}.damaged-*"))) == 1
    assert name in (tmp_path / "incidents.jsonl").read_text()


def test_what_a_run_writes_itself_is_not_set_aside_when_it_is_resumed(tmp_path: Path, opened: Open) -> None:
    run = opened(tmp_path)
    run.append_metrics({"step": 1})
    run.status("running")
    run.beat()
    opened(tmp_path)
    assert (tmp_path / "heartbeat").is_file()
    assert not (tmp_path / "incidents.jsonl").exists()
    assert not list(tmp_path.glob("*.damaged*"))


DAMAGES = [b"", b"\0" * 100, b"{", b"\xff\xfe\x00", b"a: [", b"- a", b"[" * 5000]


@pytest.mark.parametrize("name", ["config.yaml", "environment.json"])
@pytest.mark.parametrize("content", DAMAGES, ids=range(len(DAMAGES)))
def test_a_damaged_file_of_a_run_is_set_aside_and_told(
    tmp_path: Path, name: str, content: bytes, opened: Open, caplog: pytest.LogCaptureFixture
) -> None:
    opened(tmp_path)
    sound = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content)
    refuse_other_config(tmp_path, CONFIG)
    opened(tmp_path)
    assert (tmp_path / f"{name}.damaged").read_bytes() == content + b"\n"
    assert f"{name} is damaged" in caplog.text
    assert (tmp_path / name).read_bytes() == sound
    assert f"{name} was damaged" in json.loads((tmp_path / "incidents.jsonl").read_text())["reason"]


def test_another_config_is_refused_though_config_yaml_is_damaged(tmp_path: Path, opened: Open) -> None:
    opened(tmp_path)
    (tmp_path / "config.yaml").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.yaml is damaged, and by its environment\.json .* another config"):
        refuse_other_config(tmp_path, config_of("arm", "optim.lr=1e-5"))
    (tmp_path / "environment.json").write_text("{")
    refuse_other_config(tmp_path, config_of("arm", "optim.lr=1e-5"))  # nothing is left to compare


def test_damaged_lines_of_metrics_are_set_aside_and_told(
    tmp_path: Path, opened: Open, caplog: pytest.LogCaptureFixture
) -> None:
    run = opened(tmp_path)
    damaged = [b'{"step": 2, "train/lo', b"\0\0\0", b"\xff\xfe", b"[1]", b'{"no": 1}', b'{"step": "x"}', b"3", b""]
    sound = [json.dumps({"step": step, "train/loss": 1.0}).encode() for step in (1, 2, 3)]
    lines = [sound[0], *damaged, *sound[1:]]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines) + b'\n{"step": 4, "tr')
    run.truncate_metrics(2)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"\n".join(sound[:2]) + b"\n"
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == b"\n".join(damaged) + b"\n"
    assert "metrics.jsonl is damaged" in caplog.text
    assert sort_rows(tmp_path / "metrics.jsonl", "step") == ([json.loads(line) for line in sound[:2]], [])
    assert run.last_row("train/", until=2) == {"train/loss": 1.0}


def test_a_second_damaged_copy_of_a_step_is_set_aside_beside_the_first(tmp_path: Path) -> None:
    for k in range(3):
        (tmp_path / "step_00000002").mkdir()
        (tmp_path / "step_00000002" / str(k)).touch()
        _set_aside(tmp_path / "step_00000002")
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob("*/*"))
    assert found == ["damaged_step_00000002/0", "damaged_step_00000002_1/1", "damaged_step_00000002_2/2"]


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, Path.touch, lambda path: path.symlink_to("nowhere")])
def test_what_lies_where_a_checkpoint_is_written_is_removed_and_not_waited_for(tmp_path: Path, make: Callable) -> None:
    make(tmp_path / ".step_00000001.tmp")
    assert _make_empty(tmp_path / ".step_00000002.tmp") == ""
    assert [path.name for path in tmp_path.iterdir()] == [".step_00000002.tmp"]
