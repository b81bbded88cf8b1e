"""Faults of machines: every one ends in its exit code with a sentence and a usable last checkpoint, or heals."""

import json
import resource
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


def test_a_disk_that_takes_no_more_ends_in_5_and_the_checkpoints_before_stand(chain: Stages) -> None:
    """The system refuses to let files grow beyond what two steps of small files need: a real refusal of a write."""
    more = ["run.experiment=full", "loop.steps=6"]
    limit = 200_000
    done = subprocess.run(
        chain.command("arm", *more),
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 5, done.stderr
    assert "could not be written: File too large" in done.stderr
    assert "Traceback" not in done.stderr
    checkpoints = chain.runs / "full" / "arm" / "checkpoints"
    assert not list(checkpoints.glob("*"))
    assert chain.run("arm", *more).returncode == 0


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
