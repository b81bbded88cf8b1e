"""The configs of published recipes have the values of their sources; a wrong one would train without a word."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.config import load_config
from pipeline.identity import flatten
from stages import SPECS

ARM_DECAYS = ("*_log", "query")
ARM = {"data.view.resize": "squash", "data.view.crop": 0.875, "head_std": 2e-5, "optim.decay_also": ("*_log",)}
EFFICIENTVIM = {
    "engine.sync_batch_norm": False,
    "optim.decay_also": ("norm.?.weight", "*.blocks.?.norm.weight"),
    "data.view.resize": "shorter",
}
VSSD = {"engine.sync_batch_norm": False, "average.decay": 0.9999}
STATED: dict[str, dict[str, Any]] = {
    "arm/imagenet_arm_base": {"optim.decay_also": ARM_DECAYS},
    "arm/imagenet_arm_large": {"optim.decay_also": ARM_DECAYS},
    "arm/imagenet_arm_huge": {"optim.decay_also": ARM_DECAYS},
    "distill/imagenet_arm_base": ARM | {"average.decay": 0.99992},
    "distill/imagenet_arm_large": ARM | {"average.decay": 0.99992},
    "distill/imagenet_arm_huge": ARM | {"average.decay": 0.99992},
    "distill/imagenet_semivit": {"head_std": 2e-5},
    "distill/imagenet_efficientvim_m1": EFFICIENTVIM | {"mesa.weight": 1.0, "mesa.start": 0.25},
    "distill/imagenet_efficientvim_m4_dist": EFFICIENTVIM,
    "distill/imagenet_vssd_micro": VSSD,
    "distill/imagenet_vssd_tiny": VSSD,
    "distill/imagenet_vssd_tiny_hsm": VSSD | {"mesa.weight": 1.0, "mesa.start": 0.25},
    "semi/imagenet_semivit_huge": {"init_from": "distill/export-student", "teacher_from": "distill"},
    "semi/imagenet_semivim_base_released": {
        "ema.preset": "released",
        "ema.gamma": 1.0,
        "ema.pull": 0.0,
        "pseudo.threshold": 0.95,
        "pseudo.normalise": "accepted",
        "pseudo.weight": 1.0,
        "ssmixup.nu": 1.0,
    },
}


def stated() -> list[tuple[str, str, Any]]:
    return [(name, key, value) for name, values in STATED.items() for key, value in values.items()]


@pytest.mark.parametrize(("name", "key", "value"), stated())
def test_a_recipe_states_what_its_source_does(name: str, key: str, value: Any) -> None:
    path = Path(f"configs/{name}.yaml")
    config = load_config(SPECS[path.parent.name].config, path)
    found = flatten(config.model_dump())[key]
    assert (tuple(found) if isinstance(found, list) else found) == value
