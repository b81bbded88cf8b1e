"""What a plan rests on, and what it concludes."""

import json
from pathlib import Path

import pytest

from launchers.chain import read_cluster, read_steps
from launchers.plan import planner
from launchers.plan.predict import hardware
from pipeline.identity import dump_yaml

A100 = Path("configs/cluster/a100.yaml")


def test_a_run_that_has_started_gives_its_own_utilisation(tmp_path: Path) -> None:
    config = read_steps("arm", "configs/arm/smoke.yaml", [])[0].config
    cluster, _ = read_cluster(A100, [])
    assert hardware(config, cluster, tmp_path).utilisation is None
    rows = [{"step": i, "perf/mfu": mfu} for i, mfu in enumerate((0.01, 0.31, 0.32))]  # the first steps are slow
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert hardware(config, cluster, tmp_path).utilisation == 0.31


def test_precision_decides_a_gpus_peak() -> None:
    cluster, _ = read_cluster(A100, [])
    peaks = [
        hardware(
            read_steps("arm", "configs/arm/smoke.yaml", [f"engine.precision={p}"])[0].config, cluster, None
        ).peak_flops
        for p in ("bf16", "fp32")
    ]
    assert peaks == [312e12, 19.5e12]


def test_a_failed_start_is_planned_and_what_has_begun_keeps_its_plan(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Begun is what has a checkpoint: a folder alone is not. A plan of other values ends with 2, and stays on the screen."""
    data = [f"run.root={tmp_path}", f"data.train={digits / 'train'}", f"data.split={digits / 'split.json'}"]
    steps = read_steps("arm", "configs/arm/smoke.yaml", [*data, "data.test=null"])
    run, written = steps[0].folder, steps[0].folder.parent / "plan.json"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(dump_yaml(steps[0].config))
    planner.plan_ahead(steps, 1)
    first = written.read_bytes()
    assert json.loads(first)["problems"] == []
    (run / "checkpoints" / "step_00000002").mkdir(parents=True)
    (run / "checkpoints" / "step_00000002" / "COMPLETE").touch()
    other = read_steps("arm", "configs/arm/smoke.yaml", [*data, "data.test=null", "optim.lr=0.5"])
    cluster, _ = read_cluster(planner.THIS_MACHINE, ["cluster:nodes=1", "cluster:tasks_per_node=1"])
    assert planner.run(other, cluster) == 2
    planner.plan_ahead(other, 1)
    assert written.read_bytes() == first
    told = capsys.readouterr().out
    assert "holds a run with another config" in told
    assert "not written: the experiment has begun" in told
    assert planner.run(steps, cluster) == 0  # with the run's own values it is made anew
    assert "not written" not in capsys.readouterr().out
