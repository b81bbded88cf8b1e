"""Kill -9 again and again, at random moments, while every step is being saved: the end is that of a run never killed.

Two kills here; thirty, with changing layouts and with data workers too, in `make soak`. The seed of the moments is printed
when a case fails. `test_soak_commands.py` kills the other commands.
"""

import random
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from tests import warm
from tests.conftest import Stages
from tests.golden.write import losses
from tests.integration.test_faults import samples
from tests.integration.test_resume import parents, step_reached
from tests.waiting import patience

STEPS_PER_KILL = 6
SAME = [(2, 2)]  # (processes, ZeRO stage), in turn
MOVING = [(2, 2), (1, 1), (2, 3), (1, 2), (2, 0), (2, 1)]


def kill_often(chain: Stages, name: str, kills: int, layouts: Sequence[tuple[int, int]], seed: int, *more: str) -> Path:
    """Start, kill -9 one rank or the launcher, start again in the next layout, ...; then run to the end."""
    moments, run = random.Random(seed), chain.runs / name / "semi"
    for k in range(kills):
        nproc, zero = layouts[k % len(layouts)]
        arguments = [*overrides(chain, name, kills, zero), *more]
        process = warm.start(chain.command("semi", *arguments, nproc=nproc))
        wait_for_steps(run, moments.randint(1, 3), process)
        time.sleep(moments.uniform(0, 0.15))
        launcher = psutil.Process(process.pid)
        family = [process.pid, *(child.pid for child in launcher.children(recursive=True))]  # the data workers too
        ranks = [child.pid for child in launcher.children()] if nproc > 1 else []
        victim = moments.choice([process.pid, *ranks])
        assert process.poll() is None, process.errors
        psutil.Process(victim).kill()
        _, text = process.communicate(timeout=patience(20))
        assert process.returncode in (-9, 7), text
        assert gone(family), f"kill {k} left a process behind"
    nproc, zero = layouts[0]
    done = chain.run("semi", *overrides(chain, name, kills, zero), *more, nproc=nproc)
    assert done.returncode == 0, done.stderr
    assert "is damaged" not in done.stderr  # what a kill cut short never looks like a checkpoint
    return run


def overrides(chain: Stages, name: str, kills: int, zero: int) -> list[str]:
    return [
        f"run.experiment={name}",
        *parents(chain, "semi"),
        f"loop.steps={STEPS_PER_KILL * kills}",
        "loop.save_every=1",
        "optim.lr=1e-4",  # another order of sums must not be amplified into another run
        f"engine.zero_stage={zero}",
    ]


def wait_for_steps(run: Path, more: int, process: warm.Process) -> None:
    """Until this start has logged `more` steps: it first forgets those after its checkpoint."""
    deadline = time.monotonic() + patience(60)
    least = reached = step_reached(run)
    while time.monotonic() < deadline and process.poll() is None:
        reached = step_reached(run)
        least = min(least, reached)
        if reached >= least + more:
            return
        time.sleep(0.005)
    raise AssertionError(f"no progress beyond step {reached}")


def gone(pids: Sequence[int]) -> bool:
    deadline = time.monotonic() + patience(4)
    while time.monotonic() < deadline:
        if not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids):
            return True
        time.sleep(0.05)
    return False


def check_that_kills_change_nothing(
    chain: Stages, kills: int, layouts: Sequence[tuple[int, int]], seed: int, *more: str
) -> None:
    """The losses, the samples and, in one layout, the weights are those of a run that was never killed."""
    moving = len(layouts) > 1
    name = f"soak{kills}{'moving' if moving else ''}{len(more) or ''}"
    nproc, zero = layouts[0]
    straight = chain.complete("semi", *overrides(chain, f"{name}-straight", kills, zero), nproc=nproc)
    run = kill_often(chain, name, kills, layouts, seed, *more)
    steps = losses(run, "semi"), losses(straight, "semi")
    assert len(steps[0]) == len(steps[1]) == STEPS_PER_KILL * kills
    for got, want in zip(*steps, strict=True):
        assert got == (pytest.approx(want, rel=1e-3, abs=1e-3) if moving else want)
    if not moving:
        model = "export/model.safetensors"
        assert (run / model).read_bytes() == (straight / model).read_bytes()
    whole, rest = samples(straight), samples(run)
    assert rest == {step: whole[step] for step in rest}


def test_two_kills(chain: Stages) -> None:
    check_that_kills_change_nothing(chain, 2, SAME, seed=1)


@pytest.mark.soak
@pytest.mark.parametrize("layouts", [SAME, MOVING], ids=["same", "moving"])
def test_thirty_kills(chain: Stages, layouts: Sequence[tuple[int, int]]) -> None:
    check_that_kills_change_nothing(chain, 30, layouts, seed=int(time.time()))


@pytest.mark.soak
def test_thirty_kills_with_data_workers(chain: Stages) -> None:
    """The run that is never killed has no workers: they change nothing, and none outlives its rank."""
    check_that_kills_change_nothing(chain, 30, [(1, 2)], int(time.time()), "data.loader.workers=2")
