"""Stage 1 for real: it can be seen to learn, alike on any number of processes; and bf16 learns what fp32 learns."""

import json
from pathlib import Path

import pytest

from tests.conftest import Stages


def rows(run: Path, name: str) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in lines if name in row]


@pytest.mark.parametrize("zero", [1, 3])
def test_probes_are_the_same_on_two_processes(chain: Stages, zero: int) -> None:
    """At the stated cadence and after the last step; the loss of the clusters is the loss."""
    more = ["loop.eval_every=2", "probe.every=4", "loop.steps=6", "probe.neighbours=5"]
    one, two = (
        rows(
            chain.complete("arm", *more, f"run.experiment=probes{n}z{zero}", f"engine.zero_stage={zero}", nproc=n),
            "val/loss",
        )
        for n in (1, 2)
    )
    assert [row["step"] for row in one] == [2, 4, 6]
    assert (
        [row["step"] for row in one if "val/linear" in row]
        == [row["step"] for row in one if "val/knn" in row]
        == [4, 6]
    )
    for got, want in zip(two, one, strict=True):
        assert got == pytest.approx(want, rel=1e-4, abs=100 / 150 + 1e-6)  # percent: one image at most falls otherwise
    assert two[-1]["val/loss"] == pytest.approx(one[-1]["val/loss"], rel=1e-5)
    for row in rows(chain.runs / f"probes2z{zero}" / "arm", "train/loss"):
        clusters = [value for name, value in row.items() if name.startswith("cluster_loss/")]
        assert len(clusters) == 15
        assert sum(clusters) / 15 == pytest.approx(row["train/loss"], rel=1e-6)


def test_bf16_learns_what_fp32_learns(chain: Stages) -> None:
    """300 steps: every number finite, and the held-out loss within 2 % of fp32's."""
    more = ["loop.steps=300", "loop.log_every=20", "loop.save_every=300", "optim.warmup_steps=20"]
    losses = {}
    for precision in ("fp32", "bf16"):
        run = chain.complete("arm", *more, f"run.experiment={precision}", f"engine.precision={precision}")
        assert len(rows(run, "train/loss")) == 15
        losses[precision] = rows(run, "val/loss")[-1]["val/loss"]
    assert losses["fp32"] < 0.6
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)
