"""What decays, and how fast each layer learns."""

from pathlib import Path

import pytest
import torch

from pipeline.config import load_config
from pipeline.errors import ConfigError
from pipeline.models import build_from_config, build_model
from pipeline.models.arm import ARM
from pipeline.train.config import OptimConfig
from pipeline.train.optim import parameter_groups
from stages import SPECS


def test_every_parameter_is_in_one_group_with_its_decay_and_its_layers_rate() -> None:
    model = build_model("vim_nano", num_classes=10)  # depth 4: layers 0 to 5
    groups = parameter_groups(model, OptimConfig(lr=1.0, weight_decay=0.3, layer_decay=0.5))
    of = {id(p): group for group in groups for p in group["params"]}
    named = dict(model.named_parameters())
    assert sum(len(group["params"]) for group in groups) == len(named) == len(of)
    expected = {
        "head.weight": (0.3, 1.0),
        "head.bias": (0.0, 1.0),
        "norm_f.weight": (0.0, 1.0),
        "layers.3.mixer.in_proj.weight": (0.3, 0.5),
        "layers.3.mixer.A_log": (0.0, 0.5),
        "layers.0.mixer.D_b": (0.0, 0.5**4),
        "patch_embed.proj.weight": (0.3, 0.5**5),
        "pos_embed": (0.0, 0.5**5),
    }
    for name, (decay, scale) in expected.items():
        group = of[id(named[name])]
        assert (group["weight_decay"], group["lr_scale"]) == (decay, pytest.approx(scale)), name


def test_patterns_add_to_what_decays_as_released_recipes_do() -> None:
    """ARM decays A_log in both stages and the query token in pretraining (arm_vim.md 6.1)."""
    model = build_model("vim_nano", num_classes=10)
    named = dict(model.named_parameters())

    def decaying(*patterns: str) -> set[str]:
        groups = parameter_groups(model, OptimConfig(lr=1.0, weight_decay=0.3, decay_also=patterns))
        ids = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
        return {name for name, p in named.items() if id(p) in ids}

    assert decaying("*.A_log") - decaying() == {f"layers.{k}.mixer.A_log" for k in range(4)}
    with pytest.raises(ConfigError, match="'ar_token' fits no parameter that trains"):
        decaying("ar_token")


RECIPES = [p for p in sorted(Path("configs").glob("*/*.yaml")) if "decay_also" in p.read_text()]


@pytest.mark.parametrize("path", RECIPES, ids=str)
def test_the_patterns_of_a_recipe_fit_its_model(path: Path) -> None:
    """The released EfficientViM decays the weights of its layer norms, ARM its A_log and query (specs, 2.5 and 6.1)."""
    config = load_config(SPECS[path.parent.name].config, path, [])
    with torch.device("meta"):
        arm = path.parent.name == "arm"
        model = ARM(config.model, config.decoder) if arm else build_from_config(config.model)
    decaying = sum(len(g["params"]) for g in parameter_groups(model, config.optim) if g["weight_decay"])
    plain = config.optim.model_copy(update={"decay_also": ()})
    usual = sum(len(g["params"]) for g in parameter_groups(model, plain) if g["weight_decay"])
    norms = sum(type(m).__name__ == "ChannelNorm" for m in model.modules())
    logs = sum("_log" in name for name, _ in model.named_parameters())
    assert decaying - usual == (logs + 1 if arm else norms or logs)
