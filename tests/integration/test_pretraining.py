"""Stage 1 for real: it can be seen to learn, alike on any number of processes; and bf16 learns what fp32 learns."""

import json
from pathlib import Path

import pytest
import torch

from pipeline.exports.card import Card
from pipeline.exports.convert import convert
from tests.conftest import Stages
from tests.unit.exports import released


def rows(run: Path, name: str) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in lines if name in row]


@pytest.mark.parametrize("zero", [1, 3])
def test_the_linear_probe_is_the_same_on_two_processes(chain: Stages, zero: int) -> None:
    """At the stated cadence and after the last step; the loss of the clusters is the loss."""
    more = ["loop.eval_every=2", "linear_probe.every=4", "loop.steps=6", "linear_probe.neighbours=5"]
    one, two = (
        rows(
            chain.complete("arm", *more, f"run.experiment=linear{n}z{zero}", f"engine.zero_stage={zero}", nproc=n),
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
    for row in rows(chain.runs / f"linear2z{zero}" / "arm", "train/loss"):
        clusters = [value for name, value in row.items() if name.startswith("cluster_loss/")]
        assert len(clusters) == 15
        assert sum(clusters) / 15 == pytest.approx(row["train/loss"], rel=1e-6)


@pytest.mark.soak  # twice 300 steps
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


def test_stage_2_starts_from_released_weights_of_arm(chain: Stages, tmp_path: Path) -> None:
    """Converted, named in the lineage, with no label seen; a released classifier has seen more than a tenth of them."""
    shapes = released.arm_pretraining(dim=32, depth=12, tokens=64, group=4, width=128, blocks=2, patch=4)
    torch.save(released.checkpoint(released.filled(shapes)), tmp_path / "arm.pth")
    convert(tmp_path / "arm.pth", tmp_path / "arm")
    pixels = ["data.mean=[0.485, 0.456, 0.406]", "data.std=[0.229, 0.224, 0.225]", "loop.steps=4"]
    model = "model={name: arm_base, embed_dim: 32, depth: 12, image_size: 32, patch_size: 4, cluster_size: 8}"
    more = [*pixels, model, "run.experiment=released"]
    card = Card.read(chain.complete("distill", *more, f"init_from={tmp_path / 'arm'}") / "export")
    assert [parent.path for parent in card.lineage.parents] == [str(tmp_path / "arm")]
    assert not card.more_labels_than_claimed
    shapes = released.vim(dim=32, depth=2, tokens=65, classes=10, patch=4)
    torch.save(released.checkpoint(released.filled(shapes)), tmp_path / "vim.pth")
    classes = Card.read(chain.runs / "smoke" / "distill" / "export").classes
    convert(tmp_path / "vim.pth", tmp_path / "vim", classes=classes)
    model = "model={name: vim_tiny, embed_dim: 32, depth: 2, image_size: 32, patch_size: 4}"
    refused = chain.run("distill", *pixels, model, "run.experiment=refused", f"init_from={tmp_path / 'vim'}")
    assert refused.returncode == 4
    assert "whatever vim.pth was trained on" in refused.stderr
