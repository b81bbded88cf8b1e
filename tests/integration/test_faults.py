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

import psutil
import pytest

from launchers.local import spawn
from pipeline.train.checkpoint import _damage, complete
from tests.conftest import ENVIRONMENT, ROOT, Stages
from tests.golden.write import losses
from tests.integration.test_resume import parents, start_and_signal


def test_a_flipped_byte_in_any_file_of_a_checkpoint_is_seen(chain: Stages, tmp_path: Path) -> None:
    source = complete(chain.runs / "smoke" / "semi" / "checkpoints")[0]
    assert _damage(source, 0, 1) == ""
    for name in sorted(p.name for p in source.iterdir()):
        copy = tmp_path / name
        shutil.copytree(source, copy)
        data = bytearray((copy / name).read_bytes())
        data[len(data) // 2] ^= 0x10
        (copy / name).write_bytes(data)
        assert _damage(copy, 0, 1) != "", name


@pytest.mark.parametrize(
    ("first", "then"), [((2, 2), (1, 3)), ((1, 3), (2, 1))], ids=["2xZeRO2-1xZeRO3", "1xZeRO3-2xZeRO1"]
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
    """step -> stream -> manifest positions in the order of the lanes, all ranks together."""
    found: dict[int, dict[str, list[int]]] = {}
    for path in sorted((run / "report").glob("flight_rank_*.jsonl")):
        for row in map(json.loads, path.read_text().splitlines()):
            for stream, positions in row["samples"].items():
                found.setdefault(row["step"], {}).setdefault(stream, []).extend(positions)
    return found


def can_mount() -> bool:
    return subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not can_mount(), reason="a file system of its own needs user namespaces (unshare -rm)")
def test_a_full_disk_ends_in_5_and_the_newest_checkpoint_stands(chain: Stages, tmp_path: Path) -> None:
    """A real file system of 3 MB fills up with checkpoints; with more room the run goes on from the newest of them."""
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
    done = subprocess.run(
        [*command, *overrides], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    run, straight = (chain.runs / name / "arm/export/model.safetensors" for name in ("jumped", "smoke"))
    assert run.read_bytes() == straight.read_bytes()
    status = json.loads((chain.runs / "jumped/arm/status.json").read_text())
    assert status["time"] < time.time() - 365 * 86_400  # the clock did jump


def test_a_frozen_rank_ends_all_in_7(chain: Stages) -> None:
    command = chain.command("arm", "run.experiment=frozen", "loop.steps=5000", "engine.timeout_seconds=6", nproc=2)
    process = subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    checkpoints = chain.runs / "frozen" / "arm" / "checkpoints"
    deadline = time.monotonic() + 120
    while not complete(checkpoints) and time.monotonic() < deadline:
        time.sleep(0.05)
    ranks = psutil.Process(process.pid).children()
    ranks[1].send_signal(signal.SIGSTOP)
    assert process.wait(60) == 7
    text = process.stderr.read()
    process.stderr.close()
    assert "lost another rank" in text
    assert not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks)
    assert complete(checkpoints)


def test_a_time_limit_saves_and_ends_in_75(chain: Stages) -> None:
    done = chain.run("arm", "run.experiment=limited", "loop.steps=100000", "loop.time_limit_minutes=0.05")
    assert done.returncode == 75
    assert "stopped by its time limit" in done.stderr
    assert complete(chain.runs / "limited" / "arm" / "checkpoints")


def planted(chain: Stages, position: int, rank: int, *more: str) -> tuple[int, Path]:
    overrides = chain.overrides(*more, "loop.log_every=2", "loop.on_divergence=rewind")
    command = [
        sys.executable,
        "-m",
        "tests.integration.planted",
        "infinity",
        str(position),
        str(rank),
        "configs/arm/smoke.yaml",
        *overrides,
    ]
    return spawn(command, 2), chain.runs / more[0].split("=")[1] / "arm"


def test_an_infinity_on_one_rank_rewinds_all_and_the_end_never_saw_that_batch(chain: Stages) -> None:
    """Position 3 is bad on rank 1; a twin is bad there on rank 0. Both go on from step 2 with positions 2, 4, 5, ..."""
    code, run = planted(chain, 3, 1, "run.experiment=planted")
    assert code == 0
    twin_code, twin = planted(chain, 3, 0, "run.experiment=twin")
    assert twin_code == 0
    incident = json.loads((run / "incidents.jsonl").read_text().splitlines()[0])
    assert incident["position"] == 3
    assert (run / "export/model.safetensors").read_bytes() == (twin / "export/model.safetensors").read_bytes()
    flight = sorted((run / "report").glob("flight_step_*_rank_00001.jsonl"))[0]
    rows = [json.loads(line) for line in flight.read_text().splitlines()]
    assert [row["position"] for row in rows if row["loss"] == float("inf")] == [3]
    assert rows[0]["gradient_norms"]["backbone.layers.0"] > 0
    state = json.loads((complete(run / "checkpoints")[0] / "state.json").read_text())
    assert state["loop"]["left_out"] == [3]


@pytest.mark.parametrize(
    ("position", "finding"),
    [(0, "every value is finite"), (1, r"forward, backbone\.layers\.0\.mixer \(Mixer\) is the first module")],
)
def test_a_replay_names_the_first_module_that_is_not_finite(chain: Stages, position: int, finding: str) -> None:
    """Two processes diverge by an absurd learning rate; one process takes the step again and leaves the run alone."""
    more = ["run.experiment=diverged", "optim.lr=3e20", "optim.warmup_steps=0", "optim.clip_norm=0"]
    run = chain.runs / "diverged" / "arm"
    if not run.exists():
        assert chain.run("arm", *more, nproc=2).returncode == 6
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    done = subprocess.run(
        [sys.executable, "-m", "stages", "arm", "--replay", str(run), str(position)],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.match(rf"position {position} \(step {position}\): {finding}", done.stdout), done.stdout
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_touched_file_gives_a_trace(chain: Stages) -> None:
    run = chain.runs / "traced" / "arm"
    run.mkdir(parents=True)
    (run / "profile").touch()
    chain.complete("arm", "run.experiment=traced", "loop.steps=12")
    assert not (run / "profile").exists()
    trace = json.loads(next((run / "report").glob("trace_step_*.json")).read_text())
    assert any("Optimizer.step#AdamW" in event.get("name", "") for event in trace["traceEvents"])
