"""The plan's arithmetic against what DeepSpeed allocates, and laws of the predictions."""

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.gpu_static import scans_of_configs
from launchers.local import spawn
from launchers.plan.cost import (
    Cut,
    Parameter,
    checkpoint_bytes,
    collectives,
    cuts,
    held_moments,
    memory,
    partition,
    products_of_a_rank,
    starts_needed,
    traffic,
)
from launchers.plan.profile import networks, trained_parameters, work
from launchers.plan.step_time import A100, Passes, Range, Work, computing, decoding, sending, together, updating
from pipeline.config import load_config
from pipeline.models import build_model
from pipeline.models.flops import ScanSize
from pipeline.ops.cuda.counted import scan_seconds
from pipeline.train.config import OptimConfig
from pipeline.train.muon import product_flops
from pipeline.train.optim import parameter_groups
from stages import SPECS
from tests.conftest import ENVIRONMENT, ROOT
from tests.unit.launchers.zero_bytes import CASES

TEN = tuple(Parameter(f"p{i}", 1000 * i + 1, i % 3) for i in range(1, 11))


def parameters_of(values: dict[str, Any], optim: OptimConfig) -> tuple[Parameter, ...]:
    with torch.device("meta"):
        model = build_model(**values)
    groups = parameter_groups(model, optim)
    of = {id(p): i for i, group in enumerate(groups) for p in group["params"]}
    return tuple(
        Parameter(name, p.numel(), of[id(p)], moments=groups[of[id(p)]]["moments"])
        for name, p in model.named_parameters()
    )


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_predicted_bytes_of_every_zero_stage_are_the_allocated_ones(world_size: int, capfd) -> None:
    """A real engine of that many processes takes a step with each model at each stage, all in one start of the processes."""
    command = [sys.executable, "-m", "tests.unit.launchers.zero_bytes", "0", "1", "2", "3"]
    assert spawn(command, world_size) == 0
    found = [json.loads(line) for line in capfd.readouterr().out.splitlines() if line.startswith("{")]
    assert len(found) == 4 * len(CASES)
    for k, allocated in enumerate(found):
        parameters, zero = parameters_of(*CASES[k // 4]), k % 4
        planned = memory(
            parameters,
            zero_stage=zero,
            world_size=world_size,
            averages=1,
            frozen_parameters=0,
            bucket_bytes=0,
            activations=0,
            offloaded=False,
        )
        own = {Cut(0, name, start, numel) for name, start, numel in allocated.pop("shards")}
        assert own == {cut for cut in cuts(parameters, zero, world_size) if cut.rank == 0}
        for kind, number in allocated.items():
            assert getattr(planned, kind) == pytest.approx(number, rel=0.02), (zero, kind)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8, 512])
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_partitions_hold_everything_and_little_more(zero_stage: int, world_size: int) -> None:
    total = sum(p.numel for p in TEN)
    held = world_size * partition(TEN, zero_stage, world_size)
    assert total <= held <= total + (2 * world_size + 3) * len(TEN)  # each begins at a multiple of four


def test_zero_3_sends_thrice_what_a_sharded_update_leaves_out_and_one_rank_sends_nothing() -> None:
    def sent(zero: int, world: int, accumulation: int = 1) -> int:
        return traffic(TEN, zero_stage=zero, world_size=world, accumulation=accumulation, averages=0)

    weights = 4 * sum(p.numel for p in TEN)
    assert sent(1, 1) == 0
    assert sent(1, 2) == weights  # half of the gradients out, half of the weights out
    assert sent(3, 2) == 1.5 * weights
    assert sent(2, 4, accumulation=8) == 4.5 * sent(1, 4)


@pytest.mark.parametrize(("zero", "gathers"), [(0, 0), (1, 2), (2, 2), (3, 1)])
def test_averages_are_gathered_where_they_are_cut(zero: int, gathers: int) -> None:
    """Without ZeRO every rank has them. ZeRO 3 gathers one that predicts around each forward pass, and no other."""

    def sent(averages: int, inferred: int) -> int:
        return traffic(TEN, zero_stage=zero, world_size=2, accumulation=1, averages=averages, inferred=inferred)

    assert sent(2, 1) - sent(0, 0) == pytest.approx(gathers * 2 * sum(p.numel for p in TEN), abs=1)


def test_matrices_travel_to_an_inference_copy_in_bf16_and_nothing_else_does() -> None:
    halves = tuple(replace(p, copied_bytes=2) if p.group == 0 else p for p in TEN)

    def sent(parameters: tuple[Parameter, ...], averages: int) -> int:
        return traffic(parameters, zero_stage=1, world_size=2, accumulation=1, averages=averages)

    assert sent(halves, 0) == sent(TEN, 0)
    assert sent(TEN, 1) - sent(halves, 1) == sum(p.numel for p in TEN if p.group == 0)


@pytest.mark.parametrize(("zero", "times"), [(0, 1), (1, 2), (2, 2), (3, 2)])
def test_muons_matrices_are_gathered_where_they_are_cut_and_their_updates_sent(zero: int, times: int) -> None:
    muon = tuple(replace(p, moments=("exp_avg",)) if p.group == 0 else p for p in TEN)
    own = sum(p.numel for p in TEN if p.group == 0)

    def sent(parameters: tuple[Parameter, ...]) -> int:
        return traffic(parameters, zero_stage=zero, world_size=4, accumulation=1, averages=0)

    def calls(parameters: tuple[Parameter, ...]) -> int:
        return collectives(parameters, zero_stage=zero, bucket_bytes=2**20, accumulation=1, averages=0)

    assert sent(muon) - sent(TEN) == pytest.approx(times * 4 * own * 3 / 4, abs=1)
    assert calls(muon) - calls(TEN) == times
    assert partition(TEN, zero, 1) * 2 - held_moments(muon, zero, 1) == partition(
        [p for p in TEN if p.group == 0], zero, 1
    )


@pytest.mark.parametrize("world", [1, 2, 4, 64])
def test_the_plan_counts_muons_products_on_the_rank_that_computes_most(world: int) -> None:
    """The ranks' shares are the engine's: in each group the largest matrix first, each to the rank with the least work."""
    muon = tuple(replace(p, update_flops=p.numel**2 if p.group else 0) for p in TEN)
    most = 0
    for group in (1, 2):
        loads = [0] * world
        for flops in sorted((p.update_flops for p in muon if p.group == group), reverse=True):
            loads[loads.index(min(loads))] += flops
        most += max(loads)
    assert most / 1.35 <= products_of_a_rank(muon, world) <= most
    assert products_of_a_rank(TEN, world) == 0


def test_a_second_of_products_takes_a_second_at_the_peak() -> None:
    slower, least = (updating(10, 20, 0, products, A100) for products in (312e12, 0))
    assert slower.least - least.least == pytest.approx(1.0)
    assert slower.likely - least.likely == pytest.approx(2.0)


def test_a_profile_has_the_products_of_the_matrices_that_muon_steps() -> None:
    config = load_config(
        SPECS["distill"].config, ROOT / "configs/distill/demo.yaml", ["init_from=null", "optim.kind=muon"]
    )
    with torch.device("meta"):
        model = build_model("efficientvim_nano", image_size=32, num_classes=10)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    for p in trained_parameters(model, config):
        assert p.update_flops == (product_flops(shapes[p.name]) if p.moments == ("exp_avg",) else 0)
    assert any(p.update_flops for p in trained_parameters(model, config))


def test_more_ranks_are_never_slower_and_never_more_than_proportional() -> None:
    def seconds(world: int) -> float:
        sent = traffic(TEN, zero_stage=1, world_size=world, accumulation=1, averages=0)
        work = Work(flops=1e15, products=1e15, scans={}, kept=0, batch_norms=0)
        parts = computing(work, 1 / world, A100)
        parts |= {
            "update": updating(10, 20, 0, 0, A100),
            "sending": sending(sent, 4, world, A100),
            "decoding": Range(0, 0),
        }
        return together(parts, work, 1 / world, 1, A100).likely

    worlds = [2**i for i in range(10)]
    times = [seconds(n) for n in worlds]
    assert times == sorted(times, reverse=True)
    assert all(seconds(1) / (n * t) <= 1 for n, t in zip(worlds, times, strict=True))


@pytest.mark.parametrize("stage", ["arm", "distill"])
def test_scans_of_the_plan_are_those_that_gpu_static_counts(stage: str) -> None:
    """The plan finds the scans in a forward pass on the meta device, gpu_static by the configs' numbers."""
    name = f"{stage}/arm_base"
    _, layers, calls, ways, channels, steps, images = next(row for row in scans_of_configs() if row[0] == name)
    config = load_config(
        SPECS[stage].config, ROOT / f"configs/{stage}/imagenet_arm_base.yaml", ["average=null"] * (stage != "arm")
    )
    found = work(config, *networks(config, 1000), kept=0.0)
    planned = computing(found, images, A100)["scans"].least
    sizes = {"images": images, "directions": layers * calls * ways, "channels": channels, "steps": steps, "states": 16}
    assert planned == pytest.approx(
        sum(scan_seconds(way, "a100", **sizes) for way in ("forward", "backward")), rel=1e-9
    )
    assert found.products < found.flops


def test_the_least_is_below_the_likely_and_a_run_that_has_started_says_itself() -> None:
    sizes = {ScanSize(768, 197, 16): Passes(12.0, 12.0)}
    work = Work(flops=100e9, products=90e9, scans=sizes, kept=30e6, batch_norms=0)
    rest = {
        "update": updating(10**7, 2 * 10**7, 1, 0, A100),
        "sending": sending(1e8, 9, 8, A100),
        "decoding": decoding(64, 10),
    }
    whole = together(computing(work, 64, A100) | rest, work, 64, 10, A100)
    assert 0 < whole.least < whole.likely
    measured = replace(A100, utilisation=0.01)
    slow = together(computing(work, 64, measured) | rest, work, 64, 10, measured)
    assert slow.likely == pytest.approx(64 * 100e9 / (312e12 * 0.01) + rest["update"].likely + rest["sending"].likely)
    assert slow.least == whole.least


def test_few_cores_decide_the_time_of_a_step() -> None:
    work = Work(flops=1e9, products=1e9, scans={}, kept=0, batch_norms=0)
    rest = {"update": Range(0, 0), "sending": Range(0, 0)}
    one, ten = (
        together(computing(work, 64, A100) | rest | {"decoding": decoding(64, n)}, work, 64, n, A100) for n in (1, 10)
    )
    assert one.likely == pytest.approx(10 * ten.likely)
    assert one.likely == pytest.approx(64 * 2 / 219)


@pytest.mark.parametrize(("hours", "limit", "starts"), [(1, 2, 1), (10, 2, 6), (10, 48, 1), (1, 0.1, 0)])
def test_starts_leave_room_for_starting_and_saving(hours: float, limit: float, starts: int) -> None:
    assert starts_needed(3600 * hours, 3600 * limit, 360) == starts


def test_the_predicted_checkpoint_has_names_too() -> None:
    assert checkpoint_bytes(TEN, ["teacher"]) > 16 * sum(p.numel for p in TEN)


def test_activations_grow_in_proportion_to_the_batch() -> None:
    """Batches of one and two images predict a batch of five within 10 %: the kernels keep carries in blocks."""
    code = """
from launchers.plan.profile import activation_bytes
from pipeline.config import load_config
from pipeline.models import build_model
from pipeline.models.flops import ScanSize
from pipeline.ops.cuda.counted import scan_seconds
model = build_model("vim_nano", num_classes=10)
print(*(activation_bytes(model, b, (32, 32), bf16) for bf16 in (False, True) for b in (1, 2, 5)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=True
    )
    numbers = [int(word) for word in done.stdout.split()]
    for one, two, five in (numbers[:3], numbers[3:]):
        assert one + 4 * (two - one) == pytest.approx(five, rel=0.1)
    assert numbers[4] < numbers[1]  # bf16 keeps less
