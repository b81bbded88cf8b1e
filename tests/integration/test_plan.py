"""Plan against truth: the smoke chain is planned, and what its runs did is set beside it."""

import json
import re
import subprocess
import sys
from typing import Any

import pytest

from launchers.chain import read_steps
from launchers.plan import limits
from pipeline.config import load_config
from pipeline.errors import EnvironmentProblem
from pipeline.report.results import read_result
from pipeline.report.sections import plans
from stages import SPECS
from tests import warm
from tests.conftest import Stages


def planned(stages: Stages, *more: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    overrides = [*stages.overrides(*more), "cluster:nodes=1"]
    command = [sys.executable, "-m", "launchers", "plan", "chain", "smoke", *overrides]
    done = warm.run(command)
    name = next((m.split("=")[1] for m in more if m.startswith("run.experiment=")), "smoke")
    path = stages.runs / name / "plan.json"
    return done, json.loads(path.read_text()) if path.exists() else {}


@pytest.fixture(scope="module")
def plan(chain: Stages) -> dict[str, Any]:
    plan = json.loads((chain.runs / "smoke/plan.json").read_text())  # made before its first stage
    assert not plan["problems"]
    return {stage["stage"]: stage for stage in plan["stages"]}


def test_steps_are_exact_and_checkpoints_to_2_percent(chain: Stages, plan: dict[str, Any]) -> None:
    """By the table of the report, which sets plan and actual side by side."""
    rows = plans([read_result(chain.runs / "smoke")])[0].rows
    assert len(rows) >= 3 * 6
    found = {tuple(row[0].split(": ")): [float(cell) for cell in row[1:3]] for row in rows}
    for stage in SPECS:
        assert found[stage, "steps"] == [8, 8]
        planned, actual = found[stage, "images of the first stream"]
        assert planned == actual
        planned, actual = found[stage, "checkpoint, MB"]
        assert planned == pytest.approx(actual, rel=0.02)
        assert plan[stage]["checkpoints_written"] == 4


def test_a_plan_needs_no_parent_and_prints_the_scripts_of_the_chain(stages: Stages) -> None:
    done, plan = planned(stages, "run.experiment=ahead", "cluster:gpus_per_node=4", "cluster:time=12:00:00")
    assert done.returncode == 0, done.stderr
    scripts = [(stages.runs / "ahead/plan" / f"{stage}.sh").read_text() for stage in SPECS]
    assert all("#SBATCH --gpus-per-node=4" in text and "#SBATCH --time=720" in text for text in scripts)
    assert "--dependency" not in scripts[0]
    assert all("#SBATCH --dependency='afterok:" in text for text in scripts[1:])
    for step in read_steps("chain", "smoke", stages.overrides("run.experiment=ahead")):
        resolved = stages.runs / "ahead/plan" / f"{step.stage}.yaml"
        assert load_config(type(step.config), resolved) == step.config
    assert done.stdout.count("torchrun --nnodes 1 --nproc-per-node 1 ") == 3
    assert [point["world_size"] for point in plan["stages"][0]["scaling"] if point["possible"]] == [1, 2, 4]
    assert not (stages.runs / "ahead" / "arm").exists()


def test_a_plan_names_its_problems_and_ends_with_the_code_of_the_first(stages: Stages) -> None:
    done, plan = planned(stages, "run.experiment=hindered", "cluster:tasks_per_node=8")
    assert done.returncode == 2
    assert "virtual_readers 4 must be a multiple of the 8 processes" in done.stdout
    assert plan["problems"]


def test_shortages_are_problems_and_a_missing_parent_hides_no_other_stage(stages: Stages) -> None:
    """A device of a millionth of a GB, and a stage 3 whose parent nobody makes."""
    more = ["run.experiment=short", "semi:init_from=nowhere", "cluster:gpus_per_node=1", "cluster:time=0:03:00"]
    done, plan = planned(stages, *more, "cluster:device_memory_gb=1e-6")
    assert "Traceback" not in done.stderr
    assert [stage["stage"] for stage in plan["stages"]] == ["arm", "distill"]
    told = "\n".join(plan["problems"])
    for stage in ("arm", "distill"):
        assert re.search(rf"stage {stage} needs \S+ MB per rank, but a GPU \(device_memory_gb\) has 1 KB", told)
        assert f"stage {stage}: the limit cluster:time=0:03:00 leaves no time for training" in told
    assert "no export at nowhere" in told
    assert done.returncode == 2
    assert all(f"! {problem}" in done.stdout for problem in plan["problems"])
    assert [type(p) for p in limits.check_disk(10, 9)] == [EnvironmentProblem]
    assert not list(limits.check_disk(9, 10))
