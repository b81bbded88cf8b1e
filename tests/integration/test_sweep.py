"""A sweep is killed with its trial, continues, and ends in the table of a sweep that ran through."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launchers.__main__ import main
from tests.conftest import ENVIRONMENT, ROOT, Stages
from tests.integration.test_resume import step_reached
from tests.waiting import patience, wait_until

pytest.importorskip("optuna", reason="pip install 'visionmamba-pipeline[sweep]'")

OVER = ["--over", "optim.lr=1e-4..1e-2:log", "--over", "label_smoothing=0.0,0.1", "--trials", "2", "--seed", "5"]


def words(chain: Stages, experiment: str, *more: str) -> list[str]:
    """A sweep of stage 2 from random weights, six steps a trial."""
    small = ["init_from=null", "model.depth=1", "loop.steps=6", "loop.eval_every=3", f"run.experiment={experiment}"]
    return ["sweep", "distill", "configs/distill/smoke.yaml", *chain.overrides(), *small, *more]


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "sweep.csv").open() as lines:
        return list(csv.DictReader(lines))


@pytest.mark.soak
def test_a_killed_sweep_ends_in_the_same_table(chain: Stages) -> None:
    command = [sys.executable, "-m", "launchers", *words(chain, "killed", *OVER)]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | ENVIRONMENT, stdout=subprocess.DEVNULL)
    second = chain.runs / "killed-sweep-001" / "distill"
    wait_until(lambda: step_reached(second) >= 2 or process.poll() is not None, "the second trial", 120)
    process.send_signal(signal.SIGKILL)
    assert process.wait(patience(20)) == -signal.SIGKILL
    assert main(words(chain, "killed", *OVER)) == 0
    assert main(words(chain, "straight", *OVER)) == 0
    killed, straight = (table(chain.runs / f"{name}-sweep") for name in ("killed", "straight"))
    assert killed == straight
    assert [row["state"] for row in killed] == ["complete"] * 2
    scores = [float(row["val/top1"]) for row in killed]
    assert scores == sorted(scores, reverse=True)
    for row in killed:
        lr = float(row["optim.lr"])
        assert 1e-4 <= lr <= 1e-2
        card = json.loads(
            (chain.runs / f"killed-sweep-{row['trial']}" / "distill" / "export" / "model.json").read_text()
        )
        assert f"{card['selected']['best']['val/top1']:.4g}" == row["val/top1"]
        assert not any(name.startswith("test/") for name in card["metrics"])  # no trial sees a test set
    assert main(words(chain, "killed", *OVER)) == 0  # nothing is left to do
    assert table(chain.runs / "killed-sweep") == killed


def test_values_that_cannot_be_are_refused_or_fail_alone(chain: Stages, capsys: pytest.CaptureFixture[str]) -> None:
    base = words(chain, "grid")
    refused = [
        (["--over", "optim.lrr=1..2"], "optim.lrr: unknown key"),
        (["--over", "optim.lr=1e-3"], "two or more different values"),
        (["--over", "optim.lr=2..1"], "LOW below HIGH"),
        (["--over", "optim.lr=0..1:log"], "begins above 0"),
        (["--over", "optim.lr=-1..1"], "optim.lr"),
        (["--over", "data.test=a,b"], "a sweep sets this key itself"),
        (["--over", "optim.lr=1e-4..1e-2", "--sampler", "grid"], "list its values with commas"),
        ([], "a sweep needs keys to vary"),
    ]
    for more, said in refused:
        assert main([*base, *more]) == 2, more
        assert said in capsys.readouterr().err
    # Two of four points have a warm-up that is longer than the training.
    grid = ["--over", "loop.steps=3,6", "--over", "optim.warmup_steps=1,4", "--sampler", "grid", "--jobs", "2"]
    assert main([*base, *grid]) == 0
    rows = table(chain.runs / "grid-sweep")
    assert [row["state"] for row in rows] == ["complete"] * 3 + ["failed"]
    assert (rows[3]["loop.steps"], rows[3]["optim.warmup_steps"]) == ("3", "4")
    assert main([*base, *grid, "--seed", "9"]) == 2
    assert "holds a sweep with other seed" in capsys.readouterr().err
