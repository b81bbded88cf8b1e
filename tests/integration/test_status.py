"""The state of a stage, read from its folder alone: runs without SLURM."""

import fcntl
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest

from launchers import status
from launchers.queue import JobState
from pipeline.errors import ConfigError
from tests import warm
from tests.conftest import Stages
from tests.integration.test_resume import start_and_signal, step_reached


def test_complete_stages_name_what_they_came_from(chain: Stages, capsys: pytest.CaptureFixture[str]) -> None:
    assert status.show(chain.runs, ["smoke"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [[f"smoke/{s}", "complete"] for s in ("arm", "distill", "semi")]
    cards = [json.loads((chain.runs / "smoke" / s / "export/model.json").read_text()) for s in ("arm", "distill")]
    for line, card in zip(lines[1:], cards, strict=True):
        assert card["weights_sha256"][:12] in line


def test_a_parent_that_was_trained_anew_is_told(chain: Stages, tmp_path: Path) -> None:
    run, parent = tmp_path / "e" / "distill", tmp_path / "e" / "arm"
    for folder in (run, parent):
        shutil.copytree(chain.runs / "smoke" / folder.name, folder)
    for path, old, new in ((run, chain.runs / "smoke/arm/export", parent / "export"),):
        card = path / "export/model.json"
        card.write_text(card.read_text().replace(str(old), str(new)))
    assert "STALE" not in status.read_stage(run).words
    shutil.rmtree(parent / "export")
    shutil.copytree(chain.runs / "smoke/semi/export", parent / "export")
    assert "STALE: the parent holds" in status.read_stage(run).words


def test_a_killed_run_is_silent_and_a_living_one_runs(chain: Stages) -> None:
    run = chain.runs / "alive" / "arm"
    process = warm.start(chain.command("arm", "run.experiment=alive", "loop.steps=4000"))
    try:
        while step_reached(run) < 8:
            assert process.poll() is None
        alive = status.read_stage(run)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert alive.state == "running"
    assert "eta 0:" in alive.words
    killed = status.read_stage(run)
    assert killed.state == "silent"
    assert "ended without a message; start it again to continue" in killed.words
    # The same folder as another machine sees it, with a job that SLURM does not know: its heartbeat decides.
    told = {"job": "1", "logs": str(run.parent / "slurm"), "after": "", "cluster": {}}
    (run.parent / "slurm").mkdir()
    (run.parent / "slurm" / "arm.json").write_text(json.dumps(told))
    unknown = status.read_stage(run)
    assert unknown.state == "running"
    assert re.search("job 1, SLURM (is not installed here|does not respond)", unknown.words)
    old = {**json.loads((run / "status.json").read_text()), "time": 0}
    (run / "status.json").write_text(json.dumps(old))
    os.utime(run / "heartbeat", (0, 0))
    assert status.read_stage(run).state == "silent"


def test_an_interrupted_run_and_a_failed_one_say_how_they_ended(chain: Stages) -> None:
    more = ["run.experiment=halted", "loop.steps=4000"]
    assert start_and_signal(chain, "arm", *more, number=signal.SIGTERM, after_steps=3) == 75
    assert status.read_stage(chain.runs / "halted" / "arm").state == "interrupted"
    assert chain.run("arm", "run.experiment=blown", "optim.lr=1e30").returncode == 6
    failed = status.read_stage(chain.runs / "blown" / "arm")
    assert failed.state == "failed"
    assert re.search(r"is (nan|inf) by step \d+, first at data step", failed.words)


def test_before_the_first_row_of_the_log_no_end_is_foretold(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text(
        json.dumps({"state": "running", "step": 0, "steps": 120, "time": time.time()})
    )
    with (tmp_path / ".lock").open("w") as lock:  # as the process of a run holds it
        fcntl.flock(lock, fcntl.LOCK_EX)
        row = status.read_stage(tmp_path)
    assert row.state == "running"
    assert row.words.startswith("step 0 of 120 (0 %), eta unknown, last heartbeat 0:00:0")


def test_an_unknown_experiment_is_refused_with_those_that_are_there(chain: Stages) -> None:
    with pytest.raises(ConfigError, match=r"no experiment smock in .*; it has .*smoke"):
        status.show(chain.runs, ["smock"])


def test_a_job_that_slurm_has_forgotten_is_not_active() -> None:
    assert not JobState("UNKNOWN").active
    assert JobState("PENDING").active
