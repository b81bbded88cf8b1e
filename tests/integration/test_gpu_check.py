"""`make gpu-check` on a CPU: what its GPU parts run is run here with the same code, on small configs and images."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

from benchmarks import gpu_check, gpu_runs
from benchmarks.gpu_check import Part, check, demo_runner, recipes_runner, write
from benchmarks.gpu_page import page
from benchmarks.gpu_runs import Runner, waits_of
from benchmarks.gpu_scan import mixers
from pipeline.config import load_config
from pipeline.errors import EnvironmentProblem
from pipeline.train.tracer import STEPS_TRACED
from stages import SPECS
from tests import warm

SMALL = {"classes": 4, "unlabelled": 8, "size": (40, 30)}


def start(words: list[str]) -> tuple[int, str]:
    done = warm.run([sys.executable, "-m", *words])
    return done.returncode, done.stderr


@pytest.fixture(scope="module")
def runners(tmp_path_factory: pytest.TempPathFactory) -> tuple[Runner, Runner]:
    folder = tmp_path_factory.mktemp("check")
    return demo_runner(folder, start), recipes_runner(folder, start, **SMALL)


def test_losses_of_zero_stages_are_compared_step_by_step(runners: tuple[Runner, Runner]) -> None:
    short = partial(
        gpu_runs.equal_losses, runners[0], "smoke", steps=3, zeros=(0, 2), precisions=("fp32",), stages=("arm",)
    )
    found = short() | short(optimizer="muon")
    runs = ("losses_arm_fp32", "losses_arm_muon_fp32")
    assert list(found) == [f"{run}_{which}_difference" for run in runs for which in ("largest", "mean")]
    assert all(0 <= value < 1e-4 for value in found.values())


def test_a_run_is_profiled_between_two_log_lines_and_its_waits_are_counted(runners: tuple[Runner, Runner]) -> None:
    found = gpu_runs.waits(runners[0], "smoke", zeros=(0,), steps=16)
    # On a CPU only reads of numbers are seen: torch's AdamW reads its counter of each parameter, once a step.
    assert list(found) == ["waits_zero0_aten::_local_scalar_dense"]


def test_waits_of_a_trace_of_a_gpu(tmp_path: Path) -> None:
    names = ["cudaStreamSynchronize", "cudaMemcpyAsync", "Memcpy HtoD (Pageable -> Device)", "cudaStreamSynchronize"]
    names += ["Memcpy HtoD (Pinned -> Device)", "Memcpy DtoH (Device -> Pageable)", "cudaEventRecord", "aten::add"]
    path = tmp_path / "trace.json"
    path.write_text(
        json.dumps({"traceEvents": [{"ph": "X", "name": name} for name in names] + [{"ph": "M", "name": "x"}]})
    )
    assert waits_of(path) == {
        "Memcpy DtoH (Device -> Pageable)": 1 / STEPS_TRACED,
        "Memcpy HtoD (Pageable -> Device)": 1 / STEPS_TRACED,
        "cudaStreamSynchronize": 2 / STEPS_TRACED,
    }


def test_a_recipe_runs_without_its_parents_beside_its_plan(runners: tuple[Runner, Runner], tmp_path: Path) -> None:
    """A recipe of stage 3, small, on photographs made on the spot, 4 of 4 classes and 8 without a label."""
    config = tmp_path / "semi" / "imagenet_small.yaml"
    parent = tmp_path / "distill" / "imagenet_small.yaml"
    small = yaml.safe_load(Path("configs/distill/smoke.yaml").read_text())
    values = yaml.safe_load(Path("configs/semi/smoke.yaml").read_text())
    values["engine"]["micro_batch"] = 4
    for path, what in ((config, values), (parent, small)):
        path.parent.mkdir()
        path.write_text(yaml.safe_dump(what))
    words = gpu_runs.alone("semi", config, processes=1)
    planned = gpu_runs.plan(
        runners[1], "semi", config, *words, steps=8, cluster=["--cluster", "configs/cluster/cpu.yaml"]
    )
    found = gpu_runs.cost(runners[1], "semi", config, *words, steps=8, planned=planned)
    names = (
        "step_seconds",
        "step_seconds_planned",
        "step_seconds_least",
        "memory_gib",
        "memory_gib_planned",
        "mfu",
        "data_wait_share",
    )
    assert list(found) == [f"semi_imagenet_small_{name}" for name in names]
    assert all(isinstance(value, float) and value >= 0 for value in found.values())


@pytest.mark.parametrize("path", gpu_check.IMAGENET, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_imagenet_recipe_is_valid_without_its_parents(path: Path) -> None:
    stage = path.parent.name
    config = load_config(SPECS[stage].config, path, gpu_runs.alone(stage, path, processes=1))
    assert SPECS[stage].parents(config) == {}
    assert config.loop.global_batch == config.engine.micro_batch


def test_a_part_that_fails_stops_no_other_and_one_without_time_is_named(tmp_path: Path) -> None:
    def fails() -> gpu_check.Found:
        raise EnvironmentProblem("no luck")

    parts = [Part("first", fails), Part("second", lambda: {"number": 1.5})]
    found, problems = check(parts, minutes=1)
    assert problems == {"first": "no luck"}
    assert found["number"] == 1.5
    left_out, none = check(parts, minutes=-1)
    assert not none
    assert list(left_out) == ["first_left_out", "second_left_out"]
    text = write(tmp_path, "NVIDIA A100-SXM4-80GB", found, problems).read_text()
    assert "- first: no luck" in text
    path = tmp_path / "nvidia-a100-sxm4-80gb.json"
    write(tmp_path, "NVIDIA A100-SXM4-80GB", left_out, none)
    assert {"first_left_out", "number"} <= json.loads(path.read_text()).keys()
    assert json.loads(path.read_text())["failed"] == problems
    write(tmp_path, "NVIDIA A100-SXM4-80GB", *check([Part("first", lambda: {"other": 2.5})], minutes=1))
    values = json.loads(path.read_text())
    assert (values["failed"], values["number"], values["other"]) == ({}, 1.5, 2.5)
    assert ("first_left_out" in values, "second_left_out" in values) == (False, True)


@pytest.mark.parametrize("path", sorted(gpu_check.FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_the_pages_that_are_kept_say_what_was_found(path: Path) -> None:
    values = json.loads(path.read_text())
    text = path.with_suffix(".md").read_text()
    assert text == page(values)
    for section in ("Failures", "The scan", "Whole models", "Losses", "Waits", "Recipes", "Self-test"):
        assert f"\n## {section}\n" in text
    assert f"| 224 | 128 | vim_small | {values['vim_small_224_inference_ms']:.3g} |" in text


def test_mixers_are_timed_side_by_side_and_missing_ones_are_left_out() -> None:
    shape = {"batch": 2, "steps": 9, "channels": 8, "states": 4, "rank": 2}
    found = mixers(torch.device("cpu"), ("cuda", "torch", "reference"), **shape)
    assert list(found) == ["mixer_torch_train_ms", "mixer_reference_train_ms"]
    assert all(milliseconds > 0 for milliseconds in found.values())


def test_the_parts_for_a_gpu_are_all_recipes_after_what_decides(tmp_path: Path) -> None:
    names = [part.name for part in gpu_check.parts_of(tmp_path, "NVIDIA H200", gpus=2)]
    assert names[:8] == ["kernels", "tests_gpu", "scan_times", "models", "waits", "zero_stages", "muon", "faults"]
    assert names[8:] == [f"{path.parent.name}_{path.stem}" for path in gpu_check.IMAGENET]
    assert "faults" not in [part.name for part in gpu_check.parts_of(tmp_path, "NVIDIA H200", gpus=1)]
    only = ("waits", "arm_imagenet_arm_base")
    assert tuple(part.name for part in gpu_check.parts_of(tmp_path, "NVIDIA H200", 1, only)) == only
    assert not list(tmp_path.iterdir())


def test_a_command_that_fails_is_named_with_its_last_words(runners: tuple[Runner, Runner]) -> None:
    with pytest.raises(EnvironmentProblem, match=r"`python -m stages arm .*nonsense=1` ended with 2: .*nonsense"):
        runners[0].command(["stages", *runners[0].words("arm", "smoke", "wrong", "nonsense=1")])


def test_without_a_gpu_it_ends_after_the_first_part_and_says_which_device_it_lacks() -> None:
    code = "from benchmarks import gpu_check; gpu_check.CPU_TESTS = ('tests/unit/test_hot_loop.py', '-k', 'deepspeed');"
    code += "import sys; from pipeline.cli import guarded; sys.exit(guarded(gpu_check._run, []))"
    environment = warm.ENVIRONMENT | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=warm.ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 5, done.stderr
    assert "the parts for any machine pass" in done.stdout
    assert "the rest needs a GPU of compute capability 8.0 or newer" in done.stderr
