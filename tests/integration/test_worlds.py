"""One config is one optimisation: on one process or two, cut into micro-batches or not, at every ZeRO stage."""

import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.exports.export import load_export
from tests.conftest import Stages
from tests.golden.write import KEPT, losses
from tests.integration.test_resume import parents, start_and_signal

SHORT = "loop.steps=5"


def short(chain: Stages, stage: str) -> list[str]:
    """Five steps from the smoke chain's parents; in stage 3 the decay follows the discrepancy from the second on."""
    return [*parents(chain, stage), SHORT, *(["ema.warmup_steps=1"] if stage == "semi" else [])]


@pytest.fixture(scope="module")
def alone(chain: Stages) -> dict[str, list[dict[str, float]]]:
    """Five steps of every stage on one process."""
    return {stage: losses(chain.complete(stage, *short(chain, stage), "run.experiment=alone"), stage) for stage in KEPT}


@pytest.mark.parametrize("stage", KEPT)
def test_two_processes_are_one_of_twice_the_batch(chain: Stages, alone, stage: str) -> None:
    run = chain.complete(stage, *short(chain, stage), "run.experiment=two", nproc=2)
    assert len(alone[stage]) == 5
    for got, want in zip(losses(run, stage), alone[stage], strict=True):
        assert got == pytest.approx(want, rel=1e-5, abs=1e-5)


def test_accumulated_micro_batches_are_one_batch(chain: Stages, alone) -> None:
    run = chain.complete("semi", *short(chain, "semi"), "run.experiment=accumulated", "engine.micro_batch=2")
    for got, want in zip(losses(run, "semi"), alone["semi"], strict=True):
        assert got == pytest.approx(want, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize(("zero", "nproc"), [(0, 2), (1, 2), (2, 2), (3, 2), (2, 1)])
def test_every_zero_stage_and_world_gives_the_same_losses_and_the_same_teacher(
    chain: Stages, alone, zero: int, nproc: int
) -> None:
    """alpha and V are among the numbers; the teacher is what is exported, under ZeRO-3 gathered block by block."""
    more = [f"run.experiment=zero{zero}x{nproc}", f"engine.zero_stage={zero}"]
    run = chain.complete("semi", *short(chain, "semi"), *more, nproc=nproc)
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
    more = [f"run.experiment=cut-{stage}", "engine.zero_stage=3", "engine.keep_whole=0"]
    run = chain.complete(stage, *short(chain, stage), *more, nproc=2)
    for got, want in zip(losses(run, stage), alone[stage], strict=True):
        assert got == pytest.approx(want, rel=1e-5, abs=1e-5)
    export, card = load_export(run / "export")
    assert card.kind == ("pretrainer" if stage == "arm" else "classifier")
    assert all(p.isfinite().all() for p in export.parameters())


def test_ssmixup_and_the_students_own_labels_are_the_same_under_zero_3(chain: Stages) -> None:
    """Two more readers of weights under ZeRO-3: SSMixup's own parameters, and a pass without gradients through the student."""
    methods = ["ssmixup={readout: shared_C, nu: learned}", "pseudo.labeller=student", "pseudo.threshold=0.1"]
    cut = ["run.experiment=methods-cut", "engine.zero_stage=3", "engine.keep_whole=0"]
    alone = chain.complete("semi", *short(chain, "semi"), "run.experiment=methods", *methods)
    two = chain.complete("semi", *short(chain, "semi"), *cut, *methods, nproc=2)
    for got, want in zip(losses(two, "semi"), losses(alone, "semi"), strict=True):
        assert got == pytest.approx(want, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize(
    "zero", [0, pytest.param(1, marks=pytest.mark.soak), pytest.param(2, marks=pytest.mark.soak), 3]
)
def test_the_released_semi_vim_is_the_same_under_zero(chain: Stages, zero: int) -> None:
    """Its pull in the gradient, its decay, and its SSMixup beside the loss."""
    released = ["ema={preset: released, pull: 0.01}", "ssmixup={axis: logits, nu: 1.0}", "optim.warmup_steps=2"]
    released += ["pseudo.threshold=0.1", "pseudo.normalise=accepted", "pseudo.weight=1.0"]
    more = [*parents(chain, "semi"), SHORT, *released]
    alone = chain.complete("semi", *more, "run.experiment=released")
    cut = chain.complete("semi", *more, f"run.experiment=released-zero{zero}", f"engine.zero_stage={zero}", nproc=2)
    wanted = losses(alone, "semi")
    for got, want in zip(losses(cut, "semi"), wanted, strict=True):
        assert got == pytest.approx(want, rel=1e-4, abs=1e-4)
    assert wanted[0]["ema/alpha"] == 0.5
    assert last_row(alone, "train/ssmixup") > 0
    assert last_row(cut, "train/lr") == last_row(alone, "train/lr")


@pytest.mark.parametrize("zero", [2, 3])
def test_an_optimizer_in_the_hosts_memory_steps_alike(chain: Stages, alone, zero: int) -> None:
    more = [f"run.experiment=offload{zero}", f"engine.zero_stage={zero}", "engine.offload_optimizer=true"]
    run = chain.complete("semi", *short(chain, "semi"), *more, nproc=2)
    for got, want in zip(losses(run, "semi"), alone["semi"], strict=True):
        assert got == pytest.approx(want, rel=1e-5, abs=1e-5)


def test_muon_goes_on_under_another_zero_stage(chain: Stages) -> None:
    """What ZeRO 3 began on two processes goes on under ZeRO 1, with the momenta: each step is that of one process alone."""
    muon = [*short(chain, "semi"), "loop.steps=10", "optim={kind: muon, lr: 3e-3, layer_decay: 0.8, clip_norm: 1.0}"]
    wanted = losses(chain.complete("semi", *muon, "run.experiment=muon"), "semi")
    cut = ["run.experiment=muon-killed", "loop.save_every=1", "engine.keep_whole=0"]
    start_and_signal(chain, "semi", *muon, *cut, "engine.zero_stage=3", number=signal.SIGKILL, after_steps=3, nproc=2)
    resumed = chain.complete("semi", *muon, *cut, "engine.zero_stage=1", nproc=2)
    assert "resumed from" in (resumed / "log.txt").read_text()
    for got, want in zip(losses(resumed, "semi")[-8:], wanted[-8:], strict=True):
        assert got == pytest.approx(want, rel=1e-5, abs=1e-5)


@pytest.mark.soak  # inductor compiles for minutes
def test_a_compiled_model_trains_alike(chain: Stages, alone) -> None:
    run = chain.complete("arm", "run.experiment=compiled", SHORT, "engine.compile=true")
    for got, want in zip(losses(run, "arm"), alone["arm"], strict=True):
        assert got == pytest.approx(want, rel=1e-5, abs=1e-5)


def test_blocks_computed_twice_give_the_same_losses(chain: Stages, alone) -> None:
    for stage in ("arm", "semi"):
        more = [*short(chain, stage), "run.experiment=twice", "engine.activation_checkpointing=true"]
        for got, want in zip(losses(chain.complete(stage, *more), stage), alone[stage], strict=True):
            assert got == pytest.approx(want, rel=1e-5, abs=1e-5)


@pytest.mark.soak
@pytest.mark.parametrize("stage", KEPT)
def test_zero_stages_agree_over_fifty_steps(chain: Stages, stage: str) -> None:
    """To 1e-4 in fp32, on two processes, V and alpha too; the largest difference is printed (pytest -s)."""
    found = []
    for zero in range(4):
        more = [f"run.experiment=fifty{zero}", "loop.steps=50", f"engine.zero_stage={zero}"]
        found.append(losses(chain.complete(stage, *parents(chain, stage), *more, nproc=2), stage))
    loss = [[row["train/loss"] for row in rows] for rows in found]
    worst = max(abs(a - b) for other in loss[1:] for a, b in zip(loss[0], other, strict=True))
    print(f"{stage}: ZeRO 1, 2, 3 differ from 0 by at most {worst:.1e} in the loss over {len(loss[0])} steps")
    assert len(loss[0]) == 50
    assert worst <= 1e-4
    for other in found[1:]:
        for got, want in zip(other, found[0], strict=True):
            assert got == pytest.approx(want, rel=1e-4, abs=1e-4)
