"""What a person types becomes stages, points of a sweep and a cluster, or a sentence."""

import os
import shutil
from pathlib import Path

import pytest
import yaml

from launchers.chain import open_steps, read_cluster, read_points, read_steps
from launchers.config import ClusterConfig, seconds_of
from launchers.preflight import check_shared, refuse
from launchers.recipe.write import order_for_chain
from pipeline.config import load_config
from pipeline.datasets.manifest import HEADER
from pipeline.errors import ConfigError, EnvironmentProblem, HandoverError
from pipeline.exports.card import CARD, Card
from pipeline.files import file_system
from pipeline.yaml_text import parse_yaml
from stages import SPECS

CPU = Path("configs/cluster/cpu.yaml")
ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("path", sorted(Path("configs/cluster").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_preset_is_one(path: Path) -> None:
    assert load_config(ClusterConfig, path).world_size >= 1


@pytest.mark.parametrize(
    ("time", "seconds"), [("0:01:00", 60), ("72:00:00", 259_200), ("2-00:00:00", 172_800), ("1-12:30:15", 131_415)]
)
def test_a_time_is_read_as_slurm_reads_it(time: str, seconds: int) -> None:
    assert seconds_of(time) == seconds
    assert parse_yaml(f"time: {time}", "here") == {"time": time}  # YAML 1.1 would make a number of it


@pytest.mark.parametrize("time", ["90", "72:00", "2 days", "0:00:30", "1:60:00", "00:00:00", "-1:00:00", ""])
def test_any_other_time_is_refused_with_the_right_form(time: str) -> None:
    with pytest.raises(ConfigError, match="time"):
        read_cluster(CPU, [f"cluster:time='{time}'"])


def test_a_number_of_minutes_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"time = 4320: input should be a valid string"):
        read_cluster(CPU, ["cluster:time=4320"])


def test_overrides_go_to_the_cluster_to_a_stage_or_to_all() -> None:
    cluster, left = read_cluster(CPU, ["cluster:nodes=4", "run.seed=7", "arm:loop.steps=9"])
    assert cluster.nodes == 4
    steps = read_steps("chain", "smoke", left)
    assert [s.stage for s in steps] == list(SPECS)
    assert [s.config.run.seed for s in steps] == [7, 7, 7]
    assert [s.config.loop.steps for s in steps] == [9, 8, 8]


def test_a_prefix_that_is_no_stage_is_refused() -> None:
    with pytest.raises(ConfigError, match="'arn' before the colon is no stage; give one of arm, distill, semi"):
        read_steps("chain", "smoke", ["arn:loop.steps=9"])


def test_what_a_job_reads_is_the_config_that_was_checked(tmp_path: Path) -> None:
    for step in read_steps("chain", "smoke", ["optim.lr=1e-5"]):
        frozen = tmp_path / "config.yaml"
        frozen.write_text(yaml.safe_dump(step.values))
        assert load_config(SPECS[step.stage].config, frozen) == step.config


def test_a_sweep_is_a_grid_of_experiments_with_names_that_tell() -> None:
    points = read_points("arm", "configs/arm/smoke.yaml", [], ["optim.lr=1e-3,2e-3", "run.seed=0,1"])
    assert [p[0].config.run.experiment for p in points] == [
        f"smoke-lr_{lr}-seed_{seed}" for lr in ("1e-3", "2e-3") for seed in (0, 1)
    ]
    assert [(p[0].config.optim.lr, p[0].config.run.seed) for p in points][2] == (2e-3, 0)


def test_the_same_key_of_two_stages_makes_two_sweeps() -> None:
    names = {
        read_points("chain", "smoke", [], [f"{stage}:optim.lr=1e-3"])[0][0].config.run.experiment for stage in SPECS
    }
    assert names == {f"smoke-{stage}.lr_1e-3" for stage in SPECS}


def test_a_sweep_with_a_value_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="two points would have the same name"):
        read_points("arm", "configs/arm/smoke.yaml", [], ["run.seed=0,0"])


def test_a_chain_begins_with_the_first_stage_that_has_a_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for stage in ("distill", "semi"):
        (tmp_path / "configs" / stage).mkdir(parents=True)
        text = (ROOT / "configs" / stage / "smoke.yaml").read_text()
        (tmp_path / "configs" / stage / "late.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    assert [step.stage for step in read_steps("chain", "late", [])] == ["distill", "semi"]
    with pytest.raises(ConfigError, match="only distill, semi is started"):
        read_steps("chain", "late", ["arm:loop.steps=3"])
    (tmp_path / "configs" / "semi" / "late.yaml").unlink()
    with pytest.raises(ConfigError, match=r"configs/semi/late\.yaml"):
        read_steps("chain", "late", [])


def test_a_chain_that_is_not_there_says_what_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("mine/train", "mines", "birds/train"):
        folder = Path("data", name)
        folder.mkdir(parents=True)
        (folder / HEADER).touch()
    said = r"no configs/STAGE/mien.yaml, and no data at data/mien/train .* names like it: mine, mines, "
    with pytest.raises(ConfigError, match=said):
        order_for_chain("mien", None)
    for name in ("../mine", "my pets", "", "-x", "/tmp/a"):
        with pytest.raises(ConfigError, match="must begin with a letter or a digit"):
            order_for_chain(name, None)
    for name in ("mien", "my pets", "sub/x"):  # a config that is there may have any name
        path = Path(f"configs/semi/{name}.yaml")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        assert order_for_chain(name, "30m") is None


def test_a_missing_export_names_the_newest_that_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for k, name in enumerate(("a/semi", "b/distill")):
        card = Path("runs", name, "export", CARD)
        card.parent.mkdir(parents=True)
        card.touch()
        os.utime(card, (k, k))
    with pytest.raises(
        HandoverError, match=r"no export at nowhere; there are runs/b/distill/export, runs/a/semi/export$"
    ):
        Card.read(Path("nowhere"))
    with pytest.raises(HandoverError, match=r"model.json is missing; there is runs/a/semi/export$"):
        Card.read(Path("runs/a"))
    with pytest.raises(HandoverError, match=r"model.json is missing; there is runs/a/semi/export$"):
        Card.read(Path("runs/a/semi"))


def test_stages_of_two_experiments_are_no_chain() -> None:
    with pytest.raises(ConfigError, match="must share"):
        read_steps("chain", "smoke", ["semi:run.experiment=other"])


class TestBeforeAnythingIsSubmitted:
    @pytest.fixture
    def data(self, digits: Path, tmp_path: Path) -> list[str]:
        names = {"train": "train", "test": "test", "split": "split.json"}
        return [f"run.root={tmp_path}", *(f"data.{k}={digits / v}" for k, v in names.items())]

    def test_a_chain_is_checked_though_its_parents_are_not_there(self, data: list[str]) -> None:
        assert len(open_steps(read_steps("chain", "smoke", data), 2)) == 3

    def test_a_stage_alone_needs_its_parent(self, data: list[str]) -> None:
        with pytest.raises(HandoverError, match=r"no export at .*make stage-2 CONFIG=configs/distill/smoke.yaml ARGS="):
            open_steps(read_steps("semi", "configs/semi/smoke.yaml", data), 2)

    def test_a_parent_that_will_not_fit_is_seen_before_it_is_trained(self, data: list[str]) -> None:
        with pytest.raises(HandoverError, match=r"has model.embed_dim = 32, this config 48"):
            open_steps(read_steps("chain", "smoke", [*data, "distill:model.embed_dim=48"]), 2)

    def test_virtual_readers_are_a_multiple_of_the_ranks(self, data: list[str]) -> None:
        with pytest.raises(ConfigError, match="virtual_readers 4 must be a multiple of the 8 processes"):
            open_steps(read_steps("chain", "smoke", data), 8)

    def test_more_virtual_readers_than_samples_are_refused(self, data: list[str]) -> None:
        more = ["distill:data.loader.virtual_readers=64", "distill:loop.global_batch=64"]
        with pytest.raises(ConfigError, match="virtual_readers is 64, but there are only 51 labelled samples"):
            open_steps(read_steps("chain", "smoke", [*data, *more]), 2)


@pytest.mark.parametrize("installed", [False, True])
def test_without_slurm_it_says_what_to_do_here(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, installed: bool
) -> None:
    """Its commands are not there, or find no cluster."""
    for name in ("sbatch", "scontrol") * installed:
        (tmp_path / name).symlink_to(str(shutil.which("false")))
    monkeypatch.setenv("PATH", str(tmp_path))
    cluster, _ = read_cluster(CPU, [])
    why = "scontrol -o show: exit code 1" if installed else "there is no sbatch here"
    with pytest.raises(
        EnvironmentProblem, match=rf"^no SLURM answers on this machine \({why}\).* here with: make chain NAME=smoke$"
    ):
        refuse([read_steps("chain", "smoke", [])], cluster)
    with pytest.raises(EnvironmentProblem, match=r"here with: make stage-1 CONFIG=configs/arm/smoke.yaml$"):
        refuse([read_steps("arm", "configs/arm/smoke.yaml", [])], cluster)


def test_everything_a_rank_reads_must_lie_where_the_nodes_see_it(tmp_path: Path) -> None:
    teacher = {"timm": "resnet50", "weights": str(tmp_path / "t.pt"), "cache": str(tmp_path / "cache")}
    given = {
        "init_from": (f"init_from={tmp_path}", "init_from"),
        "teacher.export": (f"teacher={{export: {tmp_path}}}", "teacher.export"),
        "teacher.weights": (f"teacher={teacher}", "teacher.weights"),
        "weights.path": (f"weights={{path: {tmp_path / 'w.pt'}}}", "weights.path"),
    }
    cluster, _ = read_cluster(CPU, [f"cluster:shared=[{Path.cwd()}]"])
    for key, (override, named) in given.items():
        more = [] if key == "init_from" else ["init_from=null"]
        step = read_steps("distill", "configs/distill/smoke.yaml", [override, *more])[0]
        with pytest.raises(
            ConfigError, match=rf"^stage distill: {named} = {tmp_path}.* is not on a file system that the nodes share"
        ):
            check_shared(step, cluster)


def test_a_path_is_told_its_file_system_before_it_exists() -> None:
    assert file_system(Path("/dev/shm/not/there/yet")) == "tmpfs"
    assert file_system(Path("/proc/self")) == "proc"
    assert file_system(Path("relative")) == file_system(Path.cwd())
