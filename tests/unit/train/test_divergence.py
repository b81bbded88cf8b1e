"""What counts as a divergence at a log line, and where a rewind goes back to."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.models import build_model
from pipeline.train.checkpoint import complete, remove_after
from pipeline.train.config import LoopConfig
from pipeline.train.distributed import World
from pipeline.train.divergence import data_step_of, find_anomaly, is_spike, next_data_step
from pipeline.train.recorder import STEPS_KEPT, Recorder, block_of
from pipeline.train.saved_state import LoopRecord, SavedState

ALONE = World(0, 1, torch.device("cpu"))
LOOP = LoopConfig(steps=1000, global_batch=4, spike_mads=6.0)
NAN = float("nan")


def recorded(*losses: float, log_every: int = 1) -> Recorder:
    recorder = Recorder(log_every)
    for step, loss in enumerate(losses):
        recorder.note(step, step, {}, torch.tensor(loss))
    return recorder


def row(loss: float, skipped: float = 0.0) -> dict[str, float]:
    return {"train/loss": loss, "train/skipped_updates": skipped}


@given(st.sets(st.integers(0, 40)), st.integers(0, 60))
def test_data_steps_are_those_that_are_not_left_out(left_out: set[int], step: int) -> None:
    data_steps = [data_step for data_step in range(200) if data_step not in left_out]
    assert data_step_of(step, list(left_out)) == data_steps[step]
    loop = LoopRecord(left_out=list(left_out), rewinds=0, fingerprint=1.0)
    state = SavedState(step=step, optimizer_step=0.0, task={}, loop=loop, inputs={})
    assert next_data_step(state) == data_steps[step]


def test_only_steps_since_the_last_log_line_are_blamed() -> None:
    recorder = recorded(1.0, NAN, 1.0)
    recorder.mark_checked()
    for step, loss in ((3, 1.0), (4, NAN), (5, NAN)):
        recorder.note(step, step, {}, torch.tensor(loss))
    assert find_anomaly(row(NAN), recorder, LOOP, ALONE).data_step == 4
    recorder.forget_from(2)
    assert recorder.unchecked == []


def test_without_a_bad_loss_or_gradient_the_newest_step_is_blamed() -> None:
    anomaly = find_anomaly(row(1.0) | {"train/weight_norm": NAN}, recorded(1.0, 1.0, 1.0), LOOP, ALONE)
    assert (anomaly.reason, anomaly.data_step) == ("train/weight_norm is nan", 2)


@pytest.mark.parametrize(("most", "diverged"), [(1, True), (3, False)])
def test_skipped_updates_are_a_divergence_from_the_given_number_on(most: int, diverged: bool) -> None:
    loop = LOOP.model_copy(update={"max_skipped_steps": most})
    assert (find_anomaly(row(1.0, skipped=2.0), recorded(1.0, 1.0), loop, ALONE) is not None) == diverged


def test_a_spike_names_the_step_with_the_highest_loss_since_the_last_log_line() -> None:
    usual = [1.0 + 0.01 * (step % 5) for step in range(30)]
    recorder = recorded(*usual[:10], 9.0, *usual[11:])  # 9.0 passed, when there were too few losses to compare it with
    recorder.mark_checked()
    for step, loss in ((30, 1.0), (31, 5.0), (32, 1.2)):
        recorder.note(step, step, {}, torch.tensor(loss))
    assert find_anomaly(row(2.4), recorder, LOOP, ALONE).data_step == 31
    assert find_anomaly(row(1.05), recorder, LOOP, ALONE) is None


@given(st.lists(st.integers(0, 1000), min_size=21, max_size=41).filter(lambda x: len(x) % 2), st.integers(0, 3000))
def test_a_spike_by_its_definition(losses: list[int], loss: int) -> None:
    middle = sorted(losses)[len(losses) // 2]
    deviation = sorted(abs(x - middle) for x in losses)[len(losses) // 2]
    kept = torch.tensor(losses, dtype=torch.float64)
    assert is_spike(loss, kept, 6.0) == (loss > middle + 6 * max(deviation, 1e-8))
    assert not is_spike(loss, kept[:19], 6.0)


@pytest.mark.parametrize("log_every", [1, STEPS_KEPT + 44])
def test_the_recorder_reaches_back_to_the_last_log_line(log_every: int) -> None:
    recorder = recorded(*([1.0] * 1000), log_every=log_every)
    assert len(recorder.records) == max(STEPS_KEPT, log_every)


def test_checkpoints_of_later_steps_are_removed(tmp_path: Path) -> None:
    for step in (0, 3, 6, 9):
        (tmp_path / f"step_{step:08d}").mkdir()
        (tmp_path / f"step_{step:08d}" / "COMPLETE").write_text("{}")
    remove_after(tmp_path, 3, ALONE)
    assert [path.name for path in complete(tmp_path)] == ["step_00000003", "step_00000000"]
    assert len(list(tmp_path.iterdir())) == 2


def test_the_recorder_measures_the_gradient_of_each_block_over_all_micro_batches() -> None:
    model = build_model("vim_nano", num_classes=4, depth=2)
    recorder = Recorder(1)
    recorder.watch(model)
    for step in range(2):
        wanted = dict.fromkeys(recorder.blocks, 0.0)
        for _ in range(2):  # micro-batches
            model.zero_grad()
            model(torch.randn(2, 3, 32, 32)).square().sum().backward()
            for name, p in model.named_parameters():
                wanted[block_of(name)] += float(p.grad.double().square().sum()) if p.grad is not None else 0.0
        recorder.note(step, step, {}, torch.tensor(1.0))
        found = recorder.records[-1].block_squares
        assert found is not None
        assert found.tolist() == pytest.approx([wanted[block] for block in recorder.blocks], rel=1e-4)
