"""Training runs that a tracker follows, read back from the tracker's own store."""

import importlib.util
import signal

import pytest

from pipeline.jsonl import read_rows
from tests.conftest import Stages
from tests.integration.test_resume import start_and_signal
from tests.unit.report.test_tracker import NAMES, READ, use_trackio_of


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_a_killed_run_and_its_two_processes_are_one_curve(
    stages: Stages, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(name, reason=f"pip install 'visionmamba-pipeline[{name}]'")
    more = [f"run.experiment=followed-{name}", f"run.tracker={name}"]
    code = start_and_signal(stages, "arm", *more, number=signal.SIGKILL, after_steps=5)
    assert code == -signal.SIGKILL
    run = stages.complete("arm", *more, nproc=2)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # this process only reads
    use_trackio_of(stages.runs, monkeypatch)
    points, config = READ[name](run)
    assert str(config["optim.lr"]) == "0.003"
    rows = read_rows(run / "metrics.jsonl", "step")
    steps = {key: [row["step"] for row in rows if key in row] for row in rows for key in row if "/" in key}
    for key, expected in steps.items():
        found = [step for step, _ in points[key]]
        assert len(found) == len(set(found)), f"{key} has a step twice: {found}"
        assert set(found) <= set(expected)
        assert expected[-1] in found


def test_a_tracker_that_is_not_installed_ends_in_5_before_training(stages: Stages) -> None:
    missing = [name for name in NAMES if importlib.util.find_spec(name) is None]
    if not missing:
        pytest.skip("all trackers are installed")
    done = stages.run("arm", "run.experiment=untracked", f"run.tracker={missing[0]}")
    assert done.returncode == 5
    assert f"pip install 'visionmamba-pipeline[{missing[0]}]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (stages.runs / "untracked" / "arm" / "metrics.jsonl").exists()
