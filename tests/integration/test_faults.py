"""Faults of machines: every one ends in its exit code with a sentence and a usable last checkpoint, or heals."""

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from launchers.local import spawn
from pipeline.files import replace_text
from pipeline.train.checkpoint import _files_of, _inspect, complete
from pipeline.train.distributed import start
from tests import warm
from tests.conftest import ENVIRONMENT, ROOT, Stages
from tests.golden.write import losses
from tests.integration.test_resume import parents, start_and_signal
from tests.waiting import patience, wait_until


def test_a_flipped_byte_in_any_file_of_a_checkpoint_is_seen(chain: Stages, tmp_path: Path) -> None:
    source = complete(chain.runs / "smoke" / "semi" / "checkpoints")[0]
    world = start(60)

    def damage(folder: Path) -> str:
        files, problem = _files_of(folder)
        return problem or _inspect(folder, files, world)[1]

    assert damage(source) == ""
    for name in sorted(p.name for p in source.iterdir()):
        copy = tmp_path / name
        shutil.copytree(source, copy)
        data = bytearray((copy / name).read_bytes())
        data[len(data) // 2] ^= 0x10
        (copy / name).write_bytes(data)
        assert damage(copy) != "", name


@pytest.mark.parametrize(
    ("first", "then"), [((1, 2), (2, 3)), ((2, 3), (1, 1))], ids=["1xZeRO2-2xZeRO3", "2xZeRO3-1xZeRO1"]
)
def test_a_run_continues_on_other_processes_and_another_zero_stage(chain: Stages, first, then) -> None:
    (nproc, zero), (other_nproc, other_zero) = first, then
    name = f"run.experiment=moved{nproc}{zero}"
    more = [name, *parents(chain, "semi")]
    start_and_signal(
        chain, "semi", *more, f"engine.zero_stage={zero}", number=signal.SIGKILL, after_steps=5, nproc=nproc
    )
    run = chain.complete("semi", *more, f"engine.zero_stage={other_zero}", nproc=other_nproc)
    straight = losses(chain.runs / "smoke" / "semi", "semi")
    for got, want in zip(losses(run, "semi"), straight, strict=True):
        assert got == pytest.approx(want, rel=1e-3, abs=1e-4)
    whole, rest = samples(chain.runs / "smoke" / "semi"), samples(run)
    assert 0 < len(rest) < len(whole)
    assert rest == {step: whole[step] for step in rest}  # the very sequence, in the middle of an epoch


def samples(run: Path) -> dict[int, dict[str, list[int]]]:
    """step -> stream -> sample indices in the order of the virtual readers, all ranks together."""
    found: dict[int, dict[str, list[int]]] = {}
    for path in sorted((run / "report").glob("flight_rank_*.jsonl")):
        for row in map(json.loads, path.read_text().splitlines()):
            for stream, indices in row["samples"].items():
                found.setdefault(row["step"], {}).setdefault(stream, []).extend(indices)
    return found


def can_mount() -> bool:
    return subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not can_mount(), reason="a file system of its own needs user namespaces (unshare -rm)")
def test_a_full_disk_ends_in_5_and_keeps_the_newest_checkpoint(chain: Stages, tmp_path: Path) -> None:
    """A real file system of 3 MB fills up with checkpoints; with more space the run continues from the newest of them."""
    more = ["loop.steps=40", "loop.save_every=1", "loop.keep_checkpoints=100", f"run.root={tmp_path}"]
    command = shlex.join(chain.command("arm", *more, nproc=2))
    script = f"""
        mount -t tmpfs -o size=3m tmpfs {tmp_path} || exit 99
        {command}; echo code $?
        mount -o remount,size=200m {tmp_path}
        {command}; echo code $?
        cat {tmp_path}/smoke/arm/metrics.jsonl
    """
    done = subprocess.run(
        ["unshare", "-rm", "bash", "-c", script], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    codes = [line for line in done.stdout.splitlines() if line.startswith("code ")]
    assert codes == ["code 5", "code 0"], done.stderr
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    resumed = int(re.findall(r"resumed from .*step_(\d+)", done.stderr)[0])
    assert 0 < resumed < 40
    steps = [row["step"] for row in map(json.loads, re.findall(r"^{.*}$", done.stdout, re.M)) if "train/loss" in row]
    assert steps == list(range(1, 41))


def test_a_clock_that_jumps_changes_nothing(chain: Stages) -> None:
    """Two years back in the middle of a run with a time limit: time that decides is monotonic."""
    command = [sys.executable, "-m", "tests.integration.planted", "clock", "configs/arm/smoke.yaml"]
    overrides = chain.overrides("run.experiment=jumped", "loop.time_limit_minutes=30")
    done = warm.run([*command, *overrides])
    assert done.returncode == 0, done.stderr
    run, straight = (chain.runs / name / "arm/export/model.safetensors" for name in ("jumped", "smoke"))
    assert run.read_bytes() == straight.read_bytes()
    status = json.loads((chain.runs / "jumped/arm/status.json").read_text())
    assert status["time"] < time.time() - 365 * 86_400  # the clock did jump


def test_a_frozen_rank_ends_all_in_7(chain: Stages) -> None:
    command = chain.command("arm", "run.experiment=frozen", "loop.steps=5000", "engine.timeout_seconds=6", nproc=2)
    process = warm.start(command)
    checkpoints = chain.runs / "frozen" / "arm" / "checkpoints"
    wait_until(lambda: bool(complete(checkpoints)), "the first checkpoint", 40, context=lambda: process.errors)
    ranks = psutil.Process(process.pid).children()
    ranks[1].send_signal(signal.SIGSTOP)
    assert process.wait(patience(30)) == 7
    text = process.errors
    assert "lost another rank" in text
    assert not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks)
    assert complete(checkpoints)


def test_a_time_limit_saves_and_ends_in_75(chain: Stages) -> None:
    done = chain.run("arm", "run.experiment=limited", "loop.steps=100000", "loop.time_limit_minutes=0.05")
    assert done.returncode == 75
    assert "stopped by its time limit" in done.stderr
    assert complete(chain.runs / "limited" / "arm" / "checkpoints")


def planted(chain: Stages, fault: str, data_step: int, rank: int, *more: str) -> tuple[int, Path]:
    overrides = chain.overrides("loop.on_divergence=rewind", *more)
    command = [sys.executable, "-m", "tests.integration.planted", fault, str(data_step), str(rank)]
    return spawn([*command, "configs/arm/smoke.yaml", *overrides], 2), chain.runs / more[0].split("=")[1] / "arm"


def incidents(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "incidents.jsonl").read_text().splitlines()]


def loop_state(checkpoint: Path) -> dict[str, Any]:
    return dict(json.loads((checkpoint / "state.json").read_text())["loop"])


def left_out_from_the_start(run: Path, data_step: int, root: Path) -> Path:
    """A folder in which a run like `run` will start from its step 0, but leave out one data step."""
    copy = root / run.parent.name / run.name
    start = copy / "checkpoints" / "step_00000000"
    shutil.copytree(run / "checkpoints" / start.name, start)
    shutil.copy(run / "config.yaml", copy)
    state = json.loads((start / "state.json").read_text())
    state["loop"]["left_out"] = [data_step]
    files = json.loads((start / "COMPLETE").read_text())
    files["state.json"] = replace_text(start / "state.json", json.dumps(state))
    replace_text(start / "COMPLETE", json.dumps(files))
    return copy


def test_an_infinity_on_one_rank_rewinds_all_and_the_end_never_saw_that_batch(chain: Stages, tmp_path: Path) -> None:
    """Data step 2 is bad on rank 1; a save (step 3) falls between it and the log line (step 4). The run ends, to the bit, as
    one that has left out data step 2 from the start."""
    more = ["run.experiment=planted", "loop.log_every=4", "loop.save_every=3", "loop.keep_checkpoints=100"]
    code, run = planted(chain, "infinity", 2, 1, *more)
    assert code == 0
    straight = left_out_from_the_start(run, 2, tmp_path)
    assert chain.run("arm", *more, "loop.on_divergence=rewind", f"run.root={tmp_path}", nproc=2).returncode == 0
    assert not (straight / "incidents.jsonl").exists()
    assert (run / "export/model.safetensors").read_bytes() == (straight / "export/model.safetensors").read_bytes()
    assert [(i["step"], i["data_step"]) for i in incidents(run)] == [(3, 2)]
    flight = sorted((run / "report").glob("flight_step_*_rank_00001.jsonl"))[0]
    rows = [json.loads(line) for line in flight.read_text().splitlines()]
    assert [row["data_step"] for row in rows if row["loss"] == float("inf")] == [2]
    assert rows[0]["gradient_norms"]["backbone.layers.0"] > 0
    assert [loop_state(c)["left_out"] for c in complete(run / "checkpoints")] == [[2], [2], [2], []]  # steps 8, 6, 3, 0


@pytest.mark.parametrize(
    "zero", [pytest.param(0, marks=pytest.mark.soak), 1, pytest.param(2, marks=pytest.mark.soak), 3]
)
def test_a_gradient_that_is_not_finite_ends_alike_at_every_zero_stage(chain: Stages, zero: int) -> None:
    """ZeRO 0 applies it, 1 to 3 skip the update: at the next log line both are the same divergence, of the same step."""
    more = [f"run.experiment=gradient{zero}", f"engine.zero_stage={zero}", "loop.on_divergence=stop"]
    code, run = planted(chain, "gradient", 1, 1, *more, "loop.log_every=4", "loop.save_every=8")
    assert code == 6
    assert [(i["step"], i["data_step"]) for i in incidents(run)] == [(4, 1)]
    assert not complete(run / "checkpoints")


def test_a_tolerated_skip_is_logged_and_an_incident(chain: Stages) -> None:
    more = ["run.experiment=skipped", "loop.max_skipped_steps=2", "loop.log_every=4"]
    code, run = planted(chain, "gradient", 1, 1, *more)
    assert code == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["train/skipped_updates"] for row in rows if "train/skipped_updates" in row] == [1, 0, 0, 0]
    assert [(i["step"], i["reason"]) for i in incidents(run)] == [(2, "1 updates were skipped")]


def test_a_spike_on_one_rank_rewinds_all(chain: Stages) -> None:
    more = ["run.experiment=spike", "loop.spike_mads=20", "loop.steps=32", "loop.log_every=4", "loop.save_every=7"]
    code, run = planted(chain, "spike", 25, 1, *more)
    assert code == 0
    assert [(i["step"], i["data_step"]) for i in incidents(run)] == [(28, 25)]
    assert loop_state(complete(run / "checkpoints")[0])["left_out"] == [25]


def test_weights_that_overflow_are_never_saved_and_rewound_from(chain: Stages) -> None:
    """The first update, of a finite gradient, overflows: seen before the save, tried again with other data, given up."""
    wild = ["optim.lr=1e37", "optim.clip_norm=0", "optim.warmup_steps=0", "optim.weight_decay=10"]
    more = ["run.experiment=overflow", "loop.on_divergence=rewind", "loop.max_rewinds=2", "loop.save_every=1"]
    done = chain.run("arm", *wild, *more)
    assert done.returncode == 6, done.stderr
    assert "by step 1 after 2 rewinds" in done.stderr
    run = chain.runs / "overflow" / "arm"
    assert [i["data_step"] for i in incidents(run)] == [0, 1, 2]
    assert [c.name for c in complete(run / "checkpoints")] == ["step_00000000"]


@pytest.mark.parametrize(
    ("data_step", "finding"),
    [(0, "every value is finite"), (1, r"forward, backbone\.layers\.0\.mixer \(Mixer\) is the first module")],
)
def test_a_replay_names_the_first_module_that_is_not_finite(chain: Stages, data_step: int, finding: str) -> None:
    """Two processes diverge by an absurd learning rate; one process takes the step again and leaves the run alone."""
    more = ["run.experiment=diverged", "optim.lr=3e20", "optim.warmup_steps=0", "optim.clip_norm=0"]
    run = chain.runs / "diverged" / "arm"
    if not run.exists():
        assert chain.run("arm", *more, nproc=2).returncode == 6
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    done = warm.run([sys.executable, "-m", "stages", "arm", "--replay", str(run), str(data_step)])
    assert done.returncode == 0, done.stderr
    assert re.match(rf"data step {data_step} \(step {data_step}\): {finding}", done.stdout), done.stdout
    assert "2 micro-batches a step" in done.stderr  # a micro-batch is what one of the two processes took at once
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_replay_beyond_the_end_of_the_run_is_refused(chain: Stages) -> None:
    run = chain.runs / "smoke" / "arm"
    done = warm.run([sys.executable, "-m", "stages", "arm", "--replay", str(run), "8"])
    assert done.returncode == 2
    assert f"DATA_STEP is 8, but the 8 steps of {run} end at data step 7" in done.stderr


def test_a_touched_file_gives_a_trace(chain: Stages) -> None:
    run = chain.runs / "traced" / "arm"
    run.mkdir(parents=True)
    (run / "profile").touch()
    chain.complete("arm", "run.experiment=traced", "loop.steps=12")
    assert not (run / "profile").exists()
    trace = json.loads(next((run / "report").glob("trace_step_*.json")).read_text())
    assert any("Optimizer.step#AdamW" in event.get("name", "") for event in trace["traceEvents"])
