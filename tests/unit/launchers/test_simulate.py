"""Nothing that a rank opens, reads or sends at a start grows with the number of ranks, for every ImageNet config."""

import json
import sys
from pathlib import Path

import pytest

from launchers.plan.cost import FP32, Parameter, cuts, partition
from launchers.simulate import ranks
from tests import warm
from tests.conftest import ROOT

TEN = tuple(Parameter(f"p{i}", 1000 * i + 1, i % 3) for i in range(1, 11))
TOTAL = sum(p.numel for p in TEN)
NAMES = ("imagenet_arm_base", "imagenet_semivim_base_10pct")


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("world", [1, 2, 8, 512])
def test_cuts_cover_every_element_once_within_a_ranks_share(zero: int, world: int) -> None:
    found = cuts(TEN, zero, world)
    for p in TEN:
        own = sorted((cut.start, cut.numel) for cut in found if cut.name == p.name)
        assert [start for start, _ in own] == [sum(n for _, n in own[:k]) for k in range(len(own))]
        assert sum(n for _, n in own) == p.numel
    held = [sum(cut.numel for cut in found if cut.rank == rank) for rank in range(world)]
    assert max(held) <= partition(TEN, zero, world)
    assert sum(held) == TOTAL


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_a_restart_opens_at_most_two_files_of_its_own_world_and_reads_each_number_twice(zero: int) -> None:
    """Once to hash it, once to use it; before, each rank opened each file, 262,144 at 512 ranks."""
    for world in (8, 64, 512):
        found = ranks.restore(TEN, 2, zero, world, world)
        assert found.opens <= 2
        assert found.opens_of_all <= 2 * world + 1
    # Another number of ranks: all files together, and a rank at most its share of them and one more at each end.
    fewer = ranks.restore(TEN, 2, 1, 64, 8)
    assert fewer.opens <= 64 // 8 * 2 + 2 * 3
    assert ranks.restore(TEN, 2, 0, 1, 8).bytes == 2 * 4 * FP32 * TOTAL


def test_simulate_finds_no_growth_and_the_same_samples() -> None:
    """Stage 3 needs more images a step than the recipe's 128 for 512 ranks; it starts from both exports of stage 2."""
    words = ["simulate", "chain", f"{NAMES[0]},{NAMES[1]},{NAMES[1]}", "run.experiment=far", "--ranks", "512"]
    more = ["semi:loop.global_batch=1024", "semi:engine.micro_batch=2", "distill:average={decay: 0.9}"]
    more += ["semi:init_from=distill/export-student", "semi:teacher_from=distill"]
    done = warm.run([sys.executable, "-m", "launchers", *words, *more])  # a process of its own: it makes process groups
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["problems"] == []
    for stage in ("arm", "distill", "semi"):
        worlds = told["stages"][stage]["worlds"]
        assert next(iter(worlds)) == "8"
        assert len({world["samples"] for world in worlds.values()}) == 1
        assert {world["opens"] for world in worlds.values()} == {2}
        first, last = told["stages"][stage]["rank_0"].values()
        assert first == last
    assert "512" in told["stages"]["arm"]["worlds"]
    assert "512" in told["stages"]["semi"]["worlds"]


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/semi/imagenet_*.yaml")), ids=lambda path: path.stem)
def test_stage_3_allows_as_many_ranks_as_its_labelled_batch_has_pairs(path: Path) -> None:
    from launchers.chain import read_steps

    for batch, most in ((128, 64), (1024, 512)):
        config = read_steps("semi", str(path), [f"loop.global_batch={batch}", "engine.micro_batch=null"])[0].config
        assert ranks.why_not(config, ranks.data_of(config), most) == ""


def test_more_in_a_larger_world_is_growth() -> None:
    worlds = {8: {"opens": 2, "bytes": 9}, 16: {"opens": 3, "bytes": 5}}
    assert ranks.grows(worlds, ("opens", "bytes")) == ["opens"]
