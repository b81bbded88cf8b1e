"""The event files, read back as TensorBoard reads them."""

import errno
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator, HistogramValue
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

from pipeline.report.tensorboard import LAYOUT, Board
from tests.waiting import patience


def read(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "histograms": 0})
    return events.Reload()


def curve(folder: Path, name: str) -> list[tuple[int, float]]:
    return [(event.step, round(event.value, 4)) for event in read(folder).Scalars(name)]


def next_second() -> None:
    """Event files are named by the second they were opened in, and read in the order of their names."""
    time.sleep(1.01)


def write(board: Board, steps: range, value: float) -> None:
    for step in steps:
        board.scalars({"train/loss": value, "step": step, "samples": 8 * step}, step)


def test_a_resumed_run_is_one_curve_on_both_axes(tmp_path: Path) -> None:
    """Cut at step 7, restored from step 4."""
    first = Board(tmp_path, 0, 8)
    write(first, range(1, 8), 1.0)
    first.close()
    next_second()
    second = Board(tmp_path, 4, 8)
    write(second, range(5, 11), 2.0)
    second.close()
    assert curve(tmp_path, "train/loss") == [(s, 1.0 if s <= 4 else 2.0) for s in range(1, 11)]
    by_samples = curve(tmp_path / "by_samples", "samples/train/loss")
    assert by_samples == [(8 * s, 1.0 if s <= 4 else 2.0) for s in range(1, 11)]


def test_a_run_that_starts_anew_leaves_nothing_of_the_first_start(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        board = Board(tmp_path, 0)
        write(board, range(1, 4), value)
        board.close()
        next_second()
    assert curve(tmp_path, "train/loss") == [(s, 2.0) for s in range(1, 4)]


def test_a_rewind_undoes_what_came_after(tmp_path: Path) -> None:
    board = Board(tmp_path, 0, 8)
    write(board, range(1, 7), 1.0)
    board.rewind(3)
    write(board, range(4, 6), 2.0)
    board.close()
    assert curve(tmp_path, "train/loss") == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0)]


def test_names_without_a_slash_are_not_drawn(tmp_path: Path) -> None:
    board = Board(tmp_path, 0)
    write(board, range(1, 2), 1.0)
    board.close()
    assert read(tmp_path).Tags()["scalars"] == ["train/loss"]


def counts_of(histogram: HistogramValue) -> dict[int, int]:
    """Return class -> count; a bucket ends half a class above its class."""
    buckets = zip(histogram.bucket_limit, histogram.bucket, strict=True)
    return {int(limit - 0.5): int(count) for limit, count in buckets if count}


def test_pictures_and_histograms_are_there(tmp_path: Path) -> None:
    board = Board(tmp_path, 0)
    board.image("views/labelled", torch.rand(3, 20, 30), 5)
    board.histogram("val/confidence", np.linspace(0, 1, 100), 5)
    board.class_counts("pseudo/classes", np.array([3, 0, 1, 0]), 5)
    board.class_counts("pseudo/classes", np.zeros(4, int), 6)  # where nothing counts there is nothing to draw
    board.close()
    (image,) = read(tmp_path).Images("views/labelled")
    assert (image.step, image.width, image.height) == (5, 30, 20)
    (histogram,) = read(tmp_path).Histograms("val/confidence")
    assert histogram.histogram_value.num == 100
    (classes,) = read(tmp_path).Histograms("pseudo/classes")
    assert counts_of(classes.histogram_value) == {0: 3, 2: 1}


def test_the_layout_names_every_chart(tmp_path: Path) -> None:
    Board(tmp_path, 0).close()
    (tensor,) = read(tmp_path).Tensors("custom_scalars__config__")
    found = layout_pb2.Layout.FromString(tensor.tensor_proto.string_val[0])
    assert {c.title: [chart.title for chart in c.chart] for c in found.category} == {
        group: list(charts) for group, charts in LAYOUT.items()
    }


def test_hparams_are_written_with_the_last_numbers(tmp_path: Path) -> None:
    board = Board(tmp_path, 10)
    board.hparams({"optim.lr": 1e-3, "model.image_size": [32, 32], "init_from": None}, {"test/top1": 81.5}, 10)
    board.close()
    events = read(tmp_path)
    metadata = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    start = plugin_data_pb2.HParamsPluginData.FromString(metadata).session_start_info
    assert start.hparams["optim.lr"].number_value == 1e-3
    assert start.hparams["model.image_size"].string_value == "[32, 32]"
    assert curve(tmp_path, "test/top1") == [(10, 81.5)]


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's writer makes a folder `runs` in the current one if it is given none."""
    monkeypatch.chdir(tmp_path)
    board = Board(None, 0)
    write(board, range(2), 1.0)
    board.image("x", torch.rand(3, 2, 2), 0)
    board.histogram("x", [1.0], 0)
    board.hparams({}, {}, 0)
    board.rewind(0)
    board.close()
    assert list(tmp_path.iterdir()) == []


def every_call(board: Board) -> None:
    """What a run asks of its board."""
    for step in range(1, 4):
        board.scalars({"train/loss": float("nan"), "val/top1": 1e308, "step": step}, step)
    board.image("i", torch.zeros(3, 4, 4), 3)
    board.histogram("h", torch.arange(5.0), 3)
    board.class_counts("c", [1, 2], 3)
    board.rewind(2)
    board.hparams({"a": 1, "b": None}, {"test/top1": 1.0}, 3)


def join_writers() -> None:
    """Wait for TensorBoard's threads: what they raise belongs to the test that caused it."""
    for thread in threading.enumerate():
        if type(thread).__name__ == "_AsyncWriterThread":
            thread.join(patience(5))


def damaged_events(folder: Path) -> None:
    folder.mkdir()
    (folder / "events.out.tfevents.1.damaged").write_bytes(os.urandom(999))
    os.mkfifo(folder / "events.out.tfevents.2.fifo")


@pytest.mark.parametrize(
    ("prepare", "writes"),
    [
        (damaged_events, True),
        (lambda folder: folder.write_text(""), False),
        (lambda folder: folder.symlink_to("/proc/self"), False),
        (lambda folder: (folder.mkdir(), (folder / "by_samples").write_text("")), False),
        (lambda folder: (folder.mkdir(), os.mkfifo(folder / "by_samples")), False),
        (lambda folder: (folder.mkdir(), (folder / "by_samples").symlink_to("by_samples")), False),
    ],
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_folder_that_cannot_be_used_stops_no_training(
    tmp_path: Path, prepare: Callable[[Path], object], writes: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Old events are not read, whatever is in them."""
    prepare(tmp_path / "tb")
    with caplog.at_level(logging.WARNING):
        board = Board(tmp_path / "tb", 0, 8)
        every_call(board)
        board.close()
    join_writers()
    told = [r.getMessage() for r in caplog.records if r.name == "pipeline.report.tensorboard"]
    assert [f"{tmp_path / 'tb'} is given up (" in words for words in told] == [True] * (not writes)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_folder_that_is_taken_away_stops_no_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    board = Board(tmp_path / "tb", 0, 8)
    while (tmp_path / "tb").exists():  # the writer's thread may still be making its first file
        shutil.rmtree(tmp_path / "tb", ignore_errors=True)
    with caplog.at_level(logging.WARNING):
        every_call(board)
        board.close()
        every_call(board)
    join_writers()
    assert "tb is given up (" in caplog.text


def test_a_full_disk_is_not_passed_over(tmp_path: Path) -> None:
    """The next checkpoint would meet it, so the run ends now."""
    board = Board(tmp_path, 0, 8)

    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        board._attempt(full)
    board.close()
