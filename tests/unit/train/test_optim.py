"""What decays, and how fast each layer learns."""

from pathlib import Path

import pytest
import torch

from pipeline.config import load_config, validate
from pipeline.errors import ConfigError
from pipeline.models import build_from_config, build_model
from pipeline.models.arm import ARM
from pipeline.train.config import OptimConfig
from pipeline.train.optim import make_optimizer, moments_of, parameter_groups
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


def test_sgd_is_nesterovs_with_decay_in_the_gradient() -> None:
    """Against Sutskever's form, literally in float64: v = m v + g + wd w, w -= lr (g + wd w + m v); vectors do not decay."""
    torch.manual_seed(0)
    model = build_model("wrn_28_2", num_classes=3, depth=10).double()
    optim = OptimConfig(kind="sgd", lr=0.1, momentum=0.9, weight_decay=0.01)
    solver = make_optimizer(model, optim)
    weight, bias = model.head.weight, model.head.bias
    want = {p: p.detach().clone() for p in (weight, bias)}
    speed = {p: torch.zeros_like(p) for p in (weight, bias)}
    for _ in range(4):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        solver.step()
        for p in (weight, bias):
            gradient = p.grad + (0.01 if p is weight else 0.0) * want[p]
            speed[p] = 0.9 * speed[p] + gradient
            want[p] -= 0.1 * (gradient + 0.9 * speed[p])
    for p, value in want.items():
        torch.testing.assert_close(p.detach(), value, rtol=1e-12, atol=1e-14)
    assert all(name in solver.state[weight] for name in moments_of(model, solver)["head.weight"])


def test_options_of_the_optimizer_that_contradict_each_other_are_refused() -> None:
    for values, sentence in (
        ({"kind": "sgd", "momentum": 0}, "nesterov needs a momentum"),
        ({"schedule": "cosine_7_16", "min_lr": 0.001}, "belongs to schedule=cosine"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            validate(OptimConfig, {"lr": 0.03, **values}, "optim")


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
