"""Configs that no person means: one sentence, exit 2, at once."""

import time
from pathlib import Path

import pytest
import yaml

from pipeline.config import load_config
from pipeline.errors import ConfigError
from pipeline.yaml_text import parse_yaml
from stages import SPECS
from tests.conftest import ROOT

BOMB = "\n".join(
    ["a: &a0 [x,x,x,x,x,x,x,x,x]", *(f"b{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 15))]
)
TEXTS = {
    "a hexadecimal number without digits": ("a: 0x_", "0x_ is no number"),
    "a number of 5000 digits": (f"a: {'9' * 5000}", "no number"),
    "a tag": ("a: !!int abc", "tags such as"),
    "a tag that builds an object": ("a: !!python/object/apply:os.system [touch x]", "tags such as"),
    "aliases that stand for 10^14 values": (BOMB, "aliases such as"),
    "an alias of itself": ("a: &a [*a]", "aliases such as"),
    "deep lists": ("a: " + "[" * 10_000, "levels deep"),
    "deep mappings": ("a: " + "{a: " * 10_000, "levels deep"),
    "a NUL": ("a: x\x00", "not valid YAML"),
    "a long text": ("a: " + "x" * 200_000, "no config"),
}


@pytest.mark.parametrize("what", TEXTS)
def test_a_text_that_is_no_config_is_one_sentence_at_once(what: str) -> None:
    text, said = TEXTS[what]
    begin = time.monotonic()
    with pytest.raises(ConfigError, match=said) as error:
        parse_yaml(text, "here")
    assert time.monotonic() - begin < 2
    assert len(str(error.value).splitlines()) == 1
    assert len(str(error.value)) < 300


def test_a_date_stays_the_text_it_is() -> None:
    assert parse_yaml("experiment: 2026-01-31", "here") == {"experiment": "2026-01-31"}
    assert yaml.safe_load("2026-01-31") != "2026-01-31", "SafeLoader's own table must not change"


@pytest.mark.parametrize(
    "override",
    [
        "run.seed=18446744073709551616",
        "run.seed=-1",
        f"run.experiment={'x' * 300}",
        'run.experiment="a\\0b"',
        'data.train="a\\0b"',
        f"data.train={'x' * 300}",
        "data.train=''",
        "model.depth=100000000",
        "model.embed_dim=1e9",
        "model.in_chans=1",
        "model.in_chans=4",
        "data.std=[0,1,1]",
        "data.std=[-1,1,1]",
        "data.mean=[124,116,104]",
        "loop.steps=100000000000000000000",
        "loop.global_batch=1000000000",
        "optim.lr=1e300",
        "engine.timeout_seconds=1e300",
        "data.loader.workers=1000000",
        "augment.rand_augment=rand-foo9",
        "augment.rand_augment=rand-m",
        "augment.rand_augment=autoaugment",
        "init_from=''",
        f"init_from={'x' * 300}",
        "weights.path=''",
    ],
)
def test_an_impossible_value_is_refused_by_the_schema(override: str) -> None:
    """Each knob has its bounds, and an empty init_from does not mean to train from scratch."""
    with pytest.raises(ConfigError, match=override.partition("=")[0].partition(".")[2] or "init_from") as error:
        load_config(SPECS["distill"].config, ROOT / "configs/distill/smoke.yaml", ["model.name=vim_nano", override])
    assert "problem" in str(error.value)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    "notation", ["rand-m9-mstd0.5-inc1", "rand-m7-n3-mstd1-p0.5-mmax10", "rand", "rand-m10-inc0", ""]
)
def test_notations_of_timm_are_taken(notation: str) -> None:
    config = load_config(SPECS["arm"].config, ROOT / "configs/arm/smoke.yaml", [f"augment.rand_augment='{notation}'"])
    assert config.augment.rand_augment == notation
    from pipeline.ops.torchvision_cpu import allow_torchvision

    allow_torchvision()
    from timm.data.auto_augment import rand_augment_transform

    if notation:
        rand_augment_transform(notation, {})


def test_a_config_whose_name_is_too_long_is_a_sentence() -> None:
    with pytest.raises(ConfigError, match="cannot be looked up"):
        load_config(SPECS["arm"].config, Path("x" * 300 + ".yaml"))


@pytest.mark.parametrize(
    "model",
    [
        {"name": "timm/hf-hub:somebody/model"},
        {"name": "timm/local-dir:/etc"},
        {"name": "timm/resnet10t", "options": {"pretrained": True}},
        {"name": "timm/resnet10t", "options": {"checkpoint_path": "/etc/passwd"}},
        {"name": "timm/vit_tiny_patch16_224", "options": {"depth": 10**8}},
        {"name": "timm/vit_tiny_patch16_224", "options": {"embed_dim": 10**8}},
    ],
)
def test_a_timm_model_neither_reads_other_files_nor_takes_all_memory(model: dict) -> None:
    from pydantic import ValidationError

    from pipeline.models.config import TimmConfig

    with pytest.raises(ValidationError):
        TimmConfig(**model)
