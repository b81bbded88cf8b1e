"""What the stages say of themselves: streams, networks, paths. Everything that checks and plans reads it."""

import re
from pathlib import Path

import numpy as np
import pytest

from launchers import doctor
from launchers.chain import read_cluster, read_steps
from launchers.plan import planner
from launchers.plan.profile import profile
from pipeline.datasets.manifest import read_manifest
from pipeline.errors import ConfigError
from stages import SPECS, spec_of
from stages.check import check
from stages.spec import Subsets
from tests.conftest import ROOT
from tests.relabel import relabelled

TEACHER = "teacher={timm: resnet18, weights: w.pt, unlabelled_ratio: %d}"


def step_of(*overrides: str, name: str = "distill/smoke"):
    return read_steps(name.partition("/")[0], f"configs/{name}.yaml", overrides)[0]


def test_the_table_is_in_the_order_of_the_chain() -> None:
    assert list(SPECS) == ["arm", "distill", "semi"]
    assert [spec.number for spec in SPECS.values()] == [1, 2, 3]
    assert all(spec_of(step.config).name == step.stage for step in read_steps("chain", "smoke", []))


def test_streams_are_what_the_run_opens() -> None:
    """The global batch of each stream follows its ratio; without weight or ratio the unlabelled stream is absent."""
    subsets = Subsets(np.arange(0, 9, 2), np.arange(1, 9, 2), np.empty(0, np.int64))

    def batches(name: str, *overrides: str) -> dict[str, tuple[int, int]]:
        config = step_of(*overrides, name=name).config
        streams = spec_of(config).streams(config, subsets)
        return {name: (len(s.sample_indices), s.global_batch) for name, s in streams.items()}

    assert batches("arm/smoke", "loop.global_batch=8") == {"unlabelled": (9, 8)}
    assert batches("distill/smoke", "loop.global_batch=8") == {"labelled": (5, 8)}
    taught = ["loop.global_batch=8", "init_from=null", TEACHER % 3]
    assert batches("distill/smoke", *taught) == {"labelled": (5, 8), "unlabelled": (4, 24)}
    semi = ["loop.global_batch=8", "unlabelled_ratio=2"]
    assert batches("semi/smoke", *semi) == {"labelled": (5, 8), "unlabelled": (4, 16)}
    assert batches("semi/smoke", *semi, "pseudo.weight=0") == {"labelled": (5, 8)}


def test_too_few_unlabelled_images_for_a_distillation_teacher_are_refused(digits: Path, tmp_path: Path) -> None:
    """Nearly all images are labelled: enough for 64 virtual readers; the unlabelled ones are not."""
    from pipeline.data import main as data

    split = tmp_path / "split.json"
    words = ["--labelled", "0.98", "--validation-per-class", "15", "--seed", "0"]
    assert data(["split", str(digits / "train"), "--out", str(split), *words]) == 0
    (tmp_path / "w.pt").touch()
    given = [f"data.train={digits / 'train'}", f"data.split={split}", "data.test=null", f"run.root={tmp_path}"]
    many = ["data.loader.virtual_readers=64", "loop.global_batch=64", "init_from=null", "allow_more_labels=true"]
    teacher = (TEACHER % 1).replace("w.pt", str(tmp_path / "w.pt"))
    check(step_of(*given, *many, teacher.replace("unlabelled_ratio: 1", "unlabelled_ratio: 0")).config, 1)
    with pytest.raises(
        ConfigError, match=r"^stage distill: .*virtual_readers is 64, but there are only \d+ unlabelled"
    ):
        check(step_of(*given, *many, teacher).config, 1)


def test_the_unlabelled_stream_of_a_distillation_teacher_is_planned(digits: Path, tmp_path: Path) -> None:
    """Images and FLOPs grow in proportion, and its epochs are told."""
    given = [f"data.train={digits / 'train'}", f"data.split={digits / 'split.json'}", "data.test=null"]
    cluster, _ = read_cluster(planner.THIS_MACHINE, ["cluster:nodes=1"])
    planned = []
    for ratio in (0, 3):
        step = step_of(*given, f"run.root={tmp_path}", "init_from=null", TEACHER % ratio)
        planned.append(planner.make([step], cluster)[0]["stages"][0])
    without, beside = planned
    assert beside["images_per_step"] == 4 * without["images_per_step"]
    assert beside["flops_per_step"] == 4 * without["flops_per_step"]
    assert without["frozen_parameters"] == beside["frozen_parameters"] > 10e6
    assert set(without["epochs"]) == {"labelled"}
    assert beside["epochs"]["unlabelled"] > 0
    assert beside["memory"]["1"]["activations"] > without["memory"]["1"]["activations"]


def test_the_average_of_stage_2_is_planned_in_memory_disk_and_traffic(digits: Path, tmp_path: Path) -> None:
    given = [f"data.train={digits / 'train'}", f"data.split={digits / 'split.json'}", f"run.root={tmp_path}"]
    cluster, _ = read_cluster(planner.THIS_MACHINE, ["cluster:nodes=1", "cluster:tasks_per_node=2"])
    planned = []
    for average in ("null", "{decay: 0.99}"):
        step = step_of(*given, "init_from=null", f"average={average}")
        planned.append(planner.make([step], cluster)[0]["stages"][0])
    without, beside = planned
    weights = 4 * without["parameters"]
    memory = {zero: beside["memory"][zero]["device"] - without["memory"][zero]["device"] for zero in "0123"}
    assert memory["0"] == 2 * weights  # the average and its inference copy
    assert memory["3"] == pytest.approx(1.5 * weights, rel=0.01)  # half of the average, the whole copy
    assert beside["checkpoint_bytes"] - without["checkpoint_bytes"] == pytest.approx(
        weights, rel=0.06
    )  # and its headers
    assert beside["disk_bytes"] > without["disk_bytes"]
    assert beside["sent_bytes_per_step"] - without["sent_bytes_per_step"] == weights / 2
    assert beside["flops_per_step"] == without["flops_per_step"]
    assert beside["averages"] == ["average"]


def test_flops_of_a_step_follow_from_its_networks() -> None:
    """Three passes for an image that is trained, one for an image that is inferred."""
    arm, _, _ = read_steps("chain", "smoke", [])
    body = profile(arm.config, 10)
    assert body.workload.flops(lambda network: 1) == 3
    distill = step_of("init_from=null", TEACHER % 2).config
    assert (
        profile(distill, 10).workload.flops(lambda network: 1 if network.weights == "trained" else 100) == 3 * 3 + 300
    )
    pending = {distill.folder / "export": distill}
    for labeller in ("teacher", "student"):
        overrides = ["init_from=distill", "unlabelled_ratio=5", f"pseudo.labeller={labeller}"]
        semi = step_of(*overrides, name="semi/smoke").config
        workload = profile(semi, 10, pending).workload
        assert workload.flops(lambda network: 1) == 3 * 6 + 5
        assert workload.averages == ("teacher",)


def test_paths_are_named_by_their_keys(tmp_path: Path) -> None:
    teacher = "teacher={timm: resnet18, weights: w.pt, cache: c}"
    config = step_of("init_from=arm", teacher, f"run.root={tmp_path}", "data.test=null").config
    found = spec_of(config).paths(config)
    assert set(found) == {"run.root", "data.train", "data.split", "init_from", "teacher.weights", "teacher.cache"}
    assert found["init_from"] == tmp_path / "smoke/arm/export"
    given = step_of("init_from=null", f"teacher={{export: {tmp_path}}}").config
    assert spec_of(given).paths(given)["teacher.export"] == spec_of(given).parents(given)["teacher"] == tmp_path


@pytest.mark.parametrize("top", ["launchers", "pipeline", "benchmarks", "studies"])
def test_nobody_asks_which_stage_a_config_belongs_to(top: str) -> None:
    """The spec says it; a new stage then needs no other file."""
    asking = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in (ROOT / top).rglob("*.py")
        for line in path.read_text().splitlines()
        if re.search(r"isinstance\((self\.|step\.)?config,|getattr\((self\.|step\.)?config, [\"']", line)
    ]
    assert asking == []


def test_every_dataset_of_a_list_is_a_path_of_the_stage_and_is_planned(digits: Path, tmp_path: Path) -> None:
    """The preflight asks of each whether the nodes see it; plan and doctor count the images of all."""
    train = read_manifest(digits / "train")
    pool = relabelled(train, tmp_path / "pool", np.full(train.num_samples, -1), classes=[], shards=slice(0, 1))
    folders = f"data.train=[{train.folder},{pool.folder}]"
    given = [folders, "data.split=null", "data.test=null", f"data.validation={digits / 'test'}", f"run.root={tmp_path}"]
    step = step_of(*given, name="arm/smoke")
    found = spec_of(step.config).paths(step.config)
    assert (found["data.train[0]"], found["data.train[1]"]) == (train.folder, pool.folder)
    assert found["data.validation"] == digits / "test"
    cluster, _ = read_cluster(planner.THIS_MACHINE, ["cluster:nodes=1"])
    planned = planner.make([step], cluster)[0]["stages"][0]
    images = train.num_samples + pool.num_samples
    assert planned["epochs"]["unlabelled"] == pytest.approx(planned["samples"] / images)
    assert planned["shards"] == len(train.shards) + 1
    told = " ".join(finding.what for finding in doctor.data([step]))
    assert f"{images} images in {train.folder}, {pool.folder}; labels: {train.num_samples} for training" in told
    assert f"{pool.num_samples} unlabelled images have none" in told
