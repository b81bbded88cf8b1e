"""One config is one optimisation: on one process or two, cut into micro-batches or not, at every ZeRO stage."""

import pytest

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


@pytest.mark.parametrize("zero", [0, 1, 3])
def test_every_zero_stage_gives_the_same_losses_and_the_same_teacher(chain: Stages, alone, zero: int) -> None:
    more = [f"run.experiment=zero{zero}", SHORT, f"engine.zero_stage={zero}"]
    run = chain.complete("semi", *parents(chain, "semi"), *more, nproc=2)
    for got, want in zip(losses(run, "semi"), alone["semi"], strict=True):
        assert got == pytest.approx(want, rel=1e-5, abs=1e-5)


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
