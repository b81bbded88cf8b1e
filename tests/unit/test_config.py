"""Configs: what is refused, and with which words."""

import re
import shlex
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from pipeline.config import Strict, apply_overrides, choose, find_config, load_config, validate
from pipeline.errors import ConfigError
from pipeline.identity import FROM_DATA, dump_yaml, identity
from pipeline.yaml_text import parse_yaml
from stages import SPECS
from tests.conftest import ROOT


class Optim(Strict):
    lr: float = Field(gt=0)
    steps: int = 10


class Whole(Strict):
    name: str
    optim: Optim
    maybe: Optim | None = None


def refusal(values: dict) -> str:
    with pytest.raises(ConfigError) as caught:
        validate(Whole, values, "here")
    return str(caught.value)


def test_an_unknown_key_names_the_nearest_known_one() -> None:
    text = refusal({"name": "a", "optim": {"lr": 1, "stepz": 3}})
    assert "optim.stepz: unknown key; did you mean 'steps'?" in text


def test_an_unknown_key_inside_an_optional_section_is_explained_too() -> None:
    assert "maybe.stepz: unknown key; did you mean 'steps'?" in refusal(
        {"name": "a", "optim": {"lr": 1}, "maybe": {"lr": 1, "stepz": 3}}
    )


def test_a_key_that_was_renamed_is_refused_with_its_new_name() -> None:
    with pytest.raises(ConfigError, match=r"data\.loader\.lanes: .* write data\.loader\.virtual_readers"):
        load_config(SPECS["semi"].config, ROOT / "configs/semi/smoke.yaml", ["data.loader.lanes=4"])
    with pytest.raises(ConfigError, match=r"probe: .* write linear_probe"):
        load_config(SPECS["arm"].config, ROOT / "configs/arm/smoke.yaml", ["probe.every=4"])


def test_all_problems_are_told_at_once() -> None:
    text = refusal({"optim": {"lr": -1, "steps": "many"}})
    assert "3 problems" in text
    assert "name: missing" in text
    assert "optim.lr = -1: input should be greater than 0" in text
    assert "optim.steps = 'many'" in text


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 1e-3), ("1E5", 1e5), ("-2e-3", -2e-3), (".5e1", 5.0), ("1.5e-3", 1.5e-3), ("12", 12), ("1e", "1e")],
)
def test_scientific_notation_is_a_number(text: str, value: object) -> None:
    assert parse_yaml(text, "here") == value


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("a: 1\na: 2\n")
    with pytest.raises(ConfigError, match="line 2: key 'a' is given twice"):
        load_config(Whole, path)


def test_overrides_reach_into_sections_and_leave_the_original_alone() -> None:
    values = {"optim": {"lr": 1}}
    assert apply_overrides(values, ["optim.lr=1e-3", "name=x", "maybe.lr=2"]) == {
        "optim": {"lr": 1e-3},
        "name": "x",
        "maybe": {"lr": 2},
    }
    assert values == {"optim": {"lr": 1}}


@pytest.mark.parametrize("override", ["lr", "=1", "a..b=1"])
def test_an_override_that_is_none_is_refused(override: str) -> None:
    with pytest.raises(ConfigError, match="expected key=value"):
        apply_overrides({}, [override])


@given(st.floats(min_value=1e-300, max_value=1e300))
def test_what_is_dumped_reads_back_equal(lr: float) -> None:
    config = Whole(name="a", optim=Optim(lr=lr))
    assert validate(Whole, parse_yaml(dump_yaml(config), "dump"), "dump") == config


def test_what_the_data_gives_is_dumped_only_where_it_was_named() -> None:
    class Head(Strict):
        classes: int = Field(1000, json_schema_extra=FROM_DATA)
        width: int = 8

    class Outer(Strict):
        head: Head = Head()

    assert parse_yaml(dump_yaml(Outer()), "dump") == {"head": {"width": 8}}
    assert parse_yaml(dump_yaml(Outer(head=Head(classes=9))), "dump") == {"head": {"classes": 9, "width": 8}}


def written(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder


def test_a_file_holds_only_what_differs_from_its_base(tmp_path: Path) -> None:
    """Mappings are merged key by key, other values replaced, null removes; overrides come last."""
    folder = written(
        tmp_path,
        below="name: a\noptim: {lr: 1, steps: 5}\nmaybe: {lr: 2}\n",
        above="base: below.yaml\nname: b\noptim: {lr: 3}\nmaybe: null\n",
    )
    config = load_config(Whole, folder / "above.yaml", ["optim.steps=7"])
    assert config == Whole(name="b", optim=Optim(lr=3, steps=7))


def test_a_base_lies_beside_the_file_that_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path, below="name: a\noptim: {lr: 1}\n", above="base: below.yaml\n")
    monkeypatch.chdir("/")
    assert load_config(Whole, tmp_path / "above.yaml").name == "a"


@pytest.mark.parametrize(
    ("above", "said"),
    [
        ("base: middle.yaml", r"its base middle\.yaml has a base itself \(below\.yaml\); only one level is allowed"),
        ("base: nowhere.yaml", r"nowhere\.yaml does not exist; there are .*below\.yaml"),
        ("base: [below.yaml]", r"base = \['below\.yaml'\]; it must name a YAML file"),
    ],
)
def test_a_base_that_cannot_be_is_refused(tmp_path: Path, above: str, said: str) -> None:
    written(tmp_path, below="name: a\noptim: {lr: 1}\n", middle="base: below.yaml\n", above=above)
    with pytest.raises(ConfigError, match=said):
        load_config(Whole, tmp_path / "above.yaml")


def test_a_config_that_came_with_the_package_is_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of the current folder comes first."""
    there = ROOT / "configs/arm/smoke.yaml"
    monkeypatch.chdir(tmp_path)
    assert find_config(Path("configs/arm/smoke.yaml")) == find_config(Path("arm/smoke.yaml")) == there
    (tmp_path / "configs/arm").mkdir(parents=True)
    own = Path("configs/arm/smoke.yaml")
    own.write_text(there.read_text())
    assert find_config(own) == own
    assert find_config(Path("configs/arm/unknown.yaml")) == Path("configs/arm/unknown.yaml")


def test_choose_lists_the_known_names_nearest_first() -> None:
    with pytest.raises(ConfigError, match="unknown optimizer 'adam'; known: adamw, lamb"):
        choose("optimizer", "adam", {"lamb": 1, "adamw": 2})


@pytest.mark.parametrize(
    "path",
    sorted(p for stage in SPECS for p in (ROOT / "configs" / stage).glob("*.yaml")),
    ids=lambda p: f"{p.parent.name}-{p.stem}",
)
def test_every_config_is_valid_and_tells_its_story(path: Path) -> None:
    config = load_config(SPECS[path.parent.name].config, path)
    assert config.loop.steps > 0
    header = path.read_text().split("\n\n")[0] if "\n\n" in path.read_text() else path.read_text()
    assert "# Command" in header
    assert "# Expected" in header
    said = " ".join(line.lstrip("# ") for line in path.read_text().splitlines() if line.startswith("#"))
    for other, arguments in re.findall(r'CONFIG=(\S+)|ARGS="([^"]*)"', said):
        if other:
            path = ROOT / other
        else:  # the arguments belong to the command named before them
            load_config(SPECS[path.parent.name].config, path, shlex.split(arguments))


@pytest.mark.parametrize(
    ("path", "override", "said"),
    [
        ("distill/demo", "mix={mixup: 0.8}", "mix needs two images in each virtual reader: loop.global_batch 4 "),
        (
            "semi/demo",
            "mixup={labelled_cutmix: 1}",
            "mixing labelled images needs two images in each virtual reader: loop.global_batch 4 ",
        ),
        (
            "semi/demo",
            "ssmixup={}",
            "mixing unlabelled images needs two images in each virtual reader: loop.global_batch 4 ",
        ),
    ],
)
def test_a_lone_image_is_not_mixed_with_itself(path: str, override: str, said: str) -> None:
    stage = path.partition("/")[0]
    narrow = [
        override,
        "loop.global_batch=4",
        "data.loader.virtual_readers=4",
        *["unlabelled_ratio=1"] * (stage == "semi"),
    ]
    with pytest.raises(ConfigError, match=said + "must be at least twice"):
        load_config(SPECS[stage].config, ROOT / f"configs/{path}.yaml", narrow)
    wide = [*narrow[:2], "data.loader.virtual_readers=2", *narrow[3:]]
    load_config(SPECS[stage].config, ROOT / f"configs/{path}.yaml", wide)
    with pytest.raises(ConfigError, match=r"needs two images at once, but engine\.micro_batch is 1"):
        load_config(SPECS[stage].config, ROOT / f"configs/{path}.yaml", [*wide, "engine.micro_batch=1"])


def test_every_shipped_config_reads_back_as_it_was_dumped() -> None:
    """And it has the identity of a dump that still names the classes, as runs of before have it."""
    for stage, spec in SPECS.items():
        for path in sorted(Path("configs", stage).glob("*.yaml")):
            config = load_config(spec.config, path, [])
            again = validate(spec.config, parse_yaml(dump_yaml(config), str(path)), str(path))
            assert identity(again) == identity(config), path
            older = validate(spec.config, config.model_dump(mode="json"), str(path))
            assert identity(older).items() >= identity(config).items(), path
