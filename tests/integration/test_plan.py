"""Plan against truth: the smoke chain is planned, and what its runs did is set beside it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.observe.planned import compare, measured
from pipeline.observe.report import write_report
from stages import STAGES
from tests.conftest import ENVIRONMENT, ROOT, Stages


def planned(stages: Stages, *more: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    overrides = [*stages.overrides(*more), "cluster:nodes=1"]
    command = [sys.executable, "-m", "launchers", "plan", "chain", "smoke", *overrides]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    name = next((m.split("=")[1] for m in more if m.startswith("run.experiment=")), "smoke")
    path = stages.runs / name / "plan.json"
    return done, json.loads(path.read_text()) if path.exists() else {}


@pytest.fixture(scope="module")
def plan(chain: Stages) -> dict[str, Any]:
    done, plan = planned(chain)
    assert done.returncode == 0, done.stderr
    return {stage["stage"]: stage for stage in plan["stages"]}


@pytest.mark.parametrize("stage", STAGES)
def test_steps_are_exact_and_checkpoints_to_2_percent(chain: Stages, plan: dict[str, Any], stage: str) -> None:
    run = chain.runs / "smoke" / stage
    actual = measured(run)
    assert actual["steps"] == plan[stage]["steps"] == 8
    assert actual["checkpoint_bytes"] == pytest.approx(plan[stage]["checkpoint_bytes"], rel=0.02)
    assert plan[stage]["checkpoints_written"] == 4


def test_the_report_sets_plan_and_actual_side_by_side(chain: Stages, plan: dict[str, Any], tmp_path: Path) -> None:
    rows = {(row.stage, row.what): row for row in compare(chain.runs / "smoke")}
    assert len(rows) == 15
    assert rows["semi", "steps"].planned == rows["semi", "steps"].actual
    assert "Plan and actual" in write_report([chain.runs / "smoke"], tmp_path / "report.html").read_text()


def test_a_plan_needs_no_parent_and_prints_the_scripts_of_the_chain(chain: Stages) -> None:
    done, plan = planned(chain, "run.experiment=ahead", "cluster:gpus_per_node=4", "cluster:time=12:00:00")
    assert done.returncode == 0, done.stderr
    scripts = [stage["script"] for stage in plan["stages"]]
    assert all("#SBATCH --gpus-per-node=4" in text and "#SBATCH --time=720" in text for text in scripts)
    assert "--dependency" not in scripts[0]
    assert all("#SBATCH --dependency='afterok:" in text for text in scripts[1:])
    assert "torchrun --nnodes 1" in done.stdout
    assert [point["world_size"] for point in plan["stages"][0]["scaling"] if point["possible"]] == [1, 2, 4]
    assert not (chain.runs / "ahead" / "arm").exists()


def test_a_plan_says_what_stands_in_the_way_and_ends_with_its_code(chain: Stages) -> None:
    done, plan = planned(chain, "run.experiment=hindered", "cluster:tasks_per_node=8")
    assert done.returncode == 2
    assert "lanes 4 must be a multiple of the 8 processes" in done.stdout
    assert plan["problems"]
