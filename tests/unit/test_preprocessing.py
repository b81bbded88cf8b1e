"""How pixels are prepared: impossible values are refused by the schema, in one sentence that names the key."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from pipeline.config import load_config
from pipeline.decoding import WHITE
from pipeline.errors import ConfigError
from pipeline.exports.card import Preprocessing
from stages.configs.distill import DistillConfig
from tests.conftest import ROOT

SMOKE = Path(ROOT / "configs/distill/smoke.yaml")


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("model.in_chans=1", "model.in_chans"),
        ("model.in_chans=4", "model.in_chans"),
        ("data.std=[0.2,0,0.2]", "data.std.1"),
        ("data.std=[0.2,0.2,-0.2]", "data.std.2"),
        ("data.std=[1e-300,0.2,0.2]", "data.std.0"),
        ("data.std=[.nan,0.2,0.2]", "data.std.0"),
        ("data.std=[58,57,57]", "data.std.0"),
        ("data.mean=[124,0.4,0.4]", "data.mean.0"),
        ("data.mean=[-0.1,0.4,0.4]", "data.mean.0"),
        ("data.mean=[.nan,0.4,0.4]", "data.mean.0"),
        ("data.ground=[256,0,0]", "data.ground.0"),
        ("data.ground=[0,-1,0]", "data.ground.1"),
        ("data.max_pixels=0", "data.max_pixels"),
        ("data.max_pixels=1000000000", "data.max_pixels"),
        ("teacher={timm: resnet18, weights: w.pt, std: [0,1,1]}", "teacher.std.0"),
        ("teacher={timm: resnet18, weights: w.pt, image_size: [0,32]}", "teacher.image_size.0"),
        (
            "teacher={export: distill, mean: [0,0,0]}",
            "teacher.mean, teacher.std and teacher.image_size are for teacher.timm",
        ),
    ],
)
def test_an_impossible_value_is_refused_with_its_key(override: str, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(DistillConfig, SMOKE, [override])
    assert key in str(caught.value)


def test_a_card_with_impossible_values_is_refused() -> None:
    for values in ({"std": (0, 1, 1)}, {"mean": (2, 0, 0)}, {"ground": (0, 0, 300)}):
        with pytest.raises(ValidationError):
            Preprocessing.model_validate({"mean": (0.5,) * 3, "std": (0.5,) * 3} | values)


def test_the_ground_reaches_the_decoder_and_the_card() -> None:
    config = load_config(DistillConfig, SMOKE, ["data.ground=[0,0,0]", "data.max_pixels=1000"])
    assert config.data.preprocessing.ground == config.data.preprocessing.decoding.ground == (0, 0, 0)
    assert config.data.decoding.max_pixels == 1000
    assert load_config(DistillConfig, SMOKE, []).data.decoding.ground == WHITE
