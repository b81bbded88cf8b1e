"""Runs that are killed or stopped, and continue: the end must be the end of a run that never was."""

import json
import shutil
import signal
from pathlib import Path

import psutil
import pytest

from stages import SPECS
from tests import warm
from tests.conftest import Stages
from tests.integration.test_poison import poisoned
from tests.waiting import patience, wait_until


def step_reached(run: Path) -> int:
    path = run / "metrics.jsonl"
    return sum("train/loss" in line for line in path.read_text().splitlines()) if path.exists() else 0


def start_and_signal(
    stages: Stages, stage: str, *more: str, number: signal.Signals, after_steps: int, nproc: int = 1
) -> int:
    """Start, wait until `after_steps` rows are logged, send the signal, return the exit code."""
    run = stages.runs / next(m.split("=")[1] for m in more if m.startswith("run.experiment=")) / stage
    process = warm.start(stages.command(stage, *more, nproc=nproc))
    wait_until(
        lambda: step_reached(run) >= after_steps or process.poll() is not None,
        f"step {after_steps} of {run}",
        40,
        every=0.002,
    )
    assert step_reached(run) >= after_steps, process.errors
    process.send_signal(number)
    return process.wait(patience(20))


def parents(chain: Stages, stage: str) -> list[str]:
    before = {"distill": "arm", "semi": "distill"}.get(stage)
    return [f"init_from={chain.runs / 'smoke' / before / 'export'}"] if before else []


@pytest.mark.parametrize(("stage", "killed_after"), [("arm", 3), ("distill", 5), ("semi", 7), ("semi", 2)])
def test_kill_9_and_resume_gives_the_same_weights_bit_for_bit(chain: Stages, stage: str, killed_after: int) -> None:
    name = f"run.experiment=killed{killed_after}"
    code = start_and_signal(chain, stage, name, *parents(chain, stage), number=signal.SIGKILL, after_steps=killed_after)
    assert code == -signal.SIGKILL
    run = chain.complete(stage, *parents(chain, stage), name)
    straight = chain.runs / "smoke" / stage / "export" / "model.safetensors"
    assert (run / "export" / "model.safetensors").read_bytes() == straight.read_bytes()
    assert step_reached(run) == 8


def test_ctrl_c_on_the_launcher_saves_on_all_ranks_and_continues(chain: Stages) -> None:
    more = ["run.experiment=stopped", *parents(chain, "semi"), "loop.steps=400", "loop.save_every=400"]
    code = start_and_signal(chain, "semi", *more, number=signal.SIGINT, after_steps=2, nproc=2)
    assert code == 75
    run = chain.runs / "stopped" / "semi"
    assert '"interrupted"' in (run / "status.json").read_text()
    saved = list((run / "checkpoints").glob("step_*/COMPLETE"))
    assert len(saved) == 1
    step = int(saved[0].parent.name.removeprefix("step_"))
    assert 0 < step < 400
    code = start_and_signal(chain, "semi", *more, number=signal.SIGINT, after_steps=step + 3, nproc=2)
    assert code == 75
    rows = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows == sorted(rows)  # it went on from there, and no step is told twice
    assert len(set(rows)) >= step + 3


def test_a_stop_before_the_first_step_is_an_interruption(chain: Stages) -> None:
    more = ["run.experiment=early", *parents(chain, "semi")]
    process = warm.start(chain.command("semi", *more, nproc=2))
    wait_until(lambda: len(psutil.Process(process.pid).children()) == 2, "the launcher to start two ranks", 20)
    process.send_signal(signal.SIGTERM)
    _, text = process.communicate(timeout=patience(20))
    assert process.returncode == 75, text
    assert "Traceback" not in text


def test_a_finished_run_whose_export_was_damaged_writes_it_again(chain: Stages) -> None:
    run = chain.complete("distill", "run.experiment=mended", *parents(chain, "distill"))
    weights = run / "export" / "model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    done = chain.run("distill", "run.experiment=mended", *parents(chain, "distill"))
    assert done.returncode == 0
    assert "written again from the last checkpoint" in done.stderr
    assert weights.read_bytes() == before


def test_two_processes_may_not_work_in_one_folder(chain: Stages) -> None:
    more = ["run.experiment=shared", "loop.steps=100000"]
    first = warm.start(chain.command("arm", *more))
    wait_until(lambda: step_reached(chain.runs / "shared" / "arm") >= 1, "the first step of the first process", 40)
    second = chain.run("arm", *more)
    first.kill()
    first.wait()
    assert second.returncode == 5
    assert "another process is working in" in second.stderr


def test_a_row_that_a_kill_has_cut_does_not_stop_a_resume(chain: Stages) -> None:
    more = ["run.experiment=torn", *parents(chain, "distill")]
    start_and_signal(chain, "distill", *more, number=signal.SIGKILL, after_steps=5)
    with (chain.runs / "torn/distill/metrics.jsonl").open("a") as file:
        file.write('{"train/loss": 2.1, "st')
    assert chain.run("distill", *more).returncode == 0


def test_a_damaged_checkpoint_is_passed_over_and_another_config_refused(chain: Stages) -> None:
    more = ["run.experiment=damaged", *parents(chain, "distill")]
    start_and_signal(chain, "distill", *more, number=signal.SIGKILL, after_steps=7)
    run = chain.runs / "damaged" / "distill"
    newest = max((run / "checkpoints").glob("step_*"))
    weights = next(newest.glob("shards_*"))
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    other = chain.run("distill", *more, "optim.lr=1e-5")
    assert other.returncode == 2
    assert "optim.lr was 0.002, is now 1e-05" in other.stderr
    done = chain.run("distill", *more)
    assert done.returncode == 0
    assert f"{newest.name} is damaged" in done.stderr
    straight = chain.runs / "smoke" / "distill" / "export" / "model.safetensors"
    assert (run / "export" / "model.safetensors").read_bytes() == straight.read_bytes()


def taught(chain: Stages, name: str, parent: Path, teacher: Path, cache: Path) -> list[str]:
    """Overrides of a stage 2 that has every kind of input."""
    inputs = [f"init_from={parent}", f"teacher.export={teacher}", f"teacher.cache={cache}", "allow_more_labels=true"]
    return [f"run.experiment={name}", *inputs]


@pytest.fixture(scope="module")
def killed(chain: Stages, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The overrides of a stage 2 that was killed after its fifth step."""
    cache = tmp_path_factory.mktemp("cache")
    more = taught(chain, "moved", chain.runs / "smoke/arm/export", chain.runs / "smoke/distill/export", cache)
    start_and_signal(chain, "distill", *more, number=signal.SIGKILL, after_steps=5)
    return more


def test_a_changed_dataset_is_refused(chain: Stages, killed: list[str], tmp_path: Path) -> None:
    other = poisoned(chain.digits, tmp_path / "other")
    done = chain.run("distill", *killed, f"data.train={other / 'train'}", f"data.split={other / 'split.json'}")
    assert done.returncode == 3
    assert "moved/distill holds a run with another data.train (its hash was" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_changed_parent_is_refused(chain: Stages, killed: list[str]) -> None:
    other = chain.complete("arm", "run.experiment=other", "run.seed=1")
    done = chain.run("distill", *killed, f"init_from={other / 'export'}")
    assert done.returncode == 4
    assert "moved/distill holds a run with another init_from (its hash was" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_resumes_though_its_dataset_its_parents_and_its_caches_have_moved(
    chain: Stages, killed: list[str], tmp_path: Path
) -> None:
    shutil.copytree(chain.digits, tmp_path / "digits")
    for stage in ("arm", "distill"):
        shutil.copytree(chain.runs / "smoke" / stage / "export", tmp_path / stage)
    places = taught(chain, "moved", tmp_path / "arm", tmp_path / "distill", tmp_path / "cache")
    data = [f"data.{name}={tmp_path / 'digits' / name}" for name in ("train", "test")]
    data += [f"data.split={tmp_path / 'digits' / 'split.json'}", f"data.loader.remote.cache={tmp_path / 'remote'}"]
    run = chain.complete("distill", *places, *data, "teacher.cache_gb=1", "data.loader.remote.cache_gb=1")
    straight = chain.complete("distill", *killed, "run.experiment=unmoved")
    weights = "export/model.safetensors"
    assert (run / weights).read_bytes() == (straight / weights).read_bytes()
    assert step_reached(run) == 8


def test_every_stage_has_a_kill_test() -> None:
    marks = test_kill_9_and_resume_gives_the_same_weights_bit_for_bit.pytestmark
    assert {case[0] for case in marks[0].args[1]} == set(SPECS)
