"""One config is one optimisation: on one process or two, cut into micro-batches or not, at every ZeRO stage."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.models.export import load_export
from tests.conftest import Stages
from tests.golden.write import KEPT, losses
from tests.integration.test_resume import parents

SHORT = "loop.steps=5"


@pytest.fixture(scope="module")
def alone(chain: Stages) -> dict[str, list[dict[str, float]]]:
    """Five steps of every stage on one process."""
    return {
        stage: losses(chain.complete(stage, *parents(chain, stage), "run.experiment=alone", SHORT), stage)
        for stage in KEPT
    }


@pytest.mark.parametrize("stage", KEPT)
def test_two_processes_are_one_of_twice_the_batch(chain: Stages, alone, stage: str) -> None:
    run = chain.complete(stage, *parents(chain, stage), "run.experiment=two", SHORT, nproc=2)
    assert len(alone[stage]) == 5
    for got, want in zip(losses(run, stage), alone[stage], strict=True):
        assert got == pytest.approx(want, rel=1e-5, abs=1e-5)


def test_accumulated_micro_batches_are_one_batch(chain: Stages, alone) -> None:
    run = chain.complete("semi", *parents(chain, "semi"), "run.experiment=accumulated", SHORT, "engine.micro_batch=2")
    for got, want in zip(losses(run, "semi"), alone["semi"], strict=True):
        assert got == pytest.approx(want, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize(("zero", "nproc"), [(0, 2), (1, 2), (2, 2), (3, 2), (3, 1)])
def test_every_zero_stage_and_world_gives_the_same_losses_and_the_same_teacher(
    chain: Stages, alone, zero: int, nproc: int
) -> None:
    """alpha and V are among the numbers; the teacher is what is exported, under ZeRO-3 gathered block by block."""
    more = [f"run.experiment=zero{zero}x{nproc}", SHORT, f"engine.zero_stage={zero}"]
    run = chain.complete("semi", *parents(chain, "semi"), *more, nproc=nproc)
    for got, want in zip(losses(run, "semi"), alone["semi"], strict=True):
        assert got == pytest.approx(want, rel=1e-5, abs=1e-5)
    teachers = [load_file(r / "export" / "model.safetensors") for r in (run, chain.runs / "alone" / "semi")]
    for name, want in teachers[1].items():
        torch.testing.assert_close(teachers[0][name], want, rtol=1e-4, atol=1e-5, msg=name)
    evaluations = [last_row(r, "val/teacher_top1") for r in (run, chain.runs / "alone" / "semi")]
    assert evaluations[0] == pytest.approx(evaluations[1], abs=1.0)


def last_row(run: Path, name: str) -> float:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return next(row[name] for row in reversed(rows) if name in row)


@pytest.mark.parametrize("stage", ["arm", "semi"])
def test_zero_3_may_cut_every_parameter(chain: Stages, alone, stage: str) -> None:
    """DeepSpeed keeps small parameters whole, which would be all of these; large models have none so small."""
    more = [f"run.experiment=cut-{stage}", SHORT, "engine.zero_stage=3", "engine.keep_whole=0"]
    run = chain.complete(stage, *parents(chain, stage), *more, nproc=2)
    for got, want in zip(losses(run, stage), alone[stage], strict=True):
        assert got == pytest.approx(want, rel=1e-5, abs=1e-5)
    export, card = load_export(run / "export")
    assert card.kind == ("pretrainer" if stage == "arm" else "classifier")
    assert all(p.isfinite().all() for p in export.parameters())


@pytest.mark.parametrize("zero", [2, 3])
def test_an_optimizer_in_the_hosts_memory_steps_alike(chain: Stages, alone, zero: int) -> None:
    more = [f"run.experiment=offload{zero}", SHORT, f"engine.zero_stage={zero}", "engine.offload_optimizer=true"]
    run = chain.complete("semi", *parents(chain, "semi"), *more, nproc=2)
    for got, want in zip(losses(run, "semi"), alone["semi"], strict=True):
        assert got == pytest.approx(want, rel=1e-5, abs=1e-5)


def test_a_compiled_model_trains_alike(chain: Stages, alone) -> None:
    run = chain.complete("arm", "run.experiment=compiled", SHORT, "engine.compile=true")
    for got, want in zip(losses(run, "arm"), alone["arm"], strict=True):
        assert got == pytest.approx(want, rel=1e-5, abs=1e-5)


def test_blocks_computed_twice_give_the_same_losses(chain: Stages, alone) -> None:
    for stage in ("arm", "semi"):
        more = [*parents(chain, stage), "run.experiment=twice", SHORT, "engine.activation_checkpointing=true"]
        for got, want in zip(losses(chain.complete(stage, *more), stage), alone[stage], strict=True):
            assert got == pytest.approx(want, rel=1e-5, abs=1e-5)


@pytest.mark.soak
@pytest.mark.parametrize("stage", KEPT)
def test_zero_stages_agree_over_fifty_steps(chain: Stages, stage: str) -> None:
    """To 1e-4 in fp32, on two processes; the largest difference is printed (pytest -s)."""
    found = []
    for zero in range(4):
        more = [f"run.experiment=fifty{zero}", "loop.steps=50", f"engine.zero_stage={zero}"]
        found.append(losses(chain.complete(stage, *parents(chain, stage), *more, nproc=2), stage))
    loss = [[row["train/loss"] for row in rows] for rows in found]
    worst = max(abs(a - b) for other in loss[1:] for a, b in zip(loss[0], other, strict=True))
    print(f"{stage}: ZeRO 1, 2, 3 differ from 0 by at most {worst:.1e} in the loss over {len(loss[0])} steps")
    assert len(loss[0]) == 50
    assert worst <= 1e-4
