"""What a plan rests on, and what it concludes."""

import json
from pathlib import Path

from launchers.chain import read_cluster, read_steps
from launchers.plan import hardware

A100 = Path("configs/cluster/a100.yaml")


def test_a_run_that_has_started_gives_its_own_utilisation(tmp_path: Path) -> None:
    config = read_steps("arm", "configs/arm/smoke.yaml", [])[0].config
    cluster, _ = read_cluster(A100, [])
    assert hardware(config, cluster, tmp_path).utilisation == 0.25
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
