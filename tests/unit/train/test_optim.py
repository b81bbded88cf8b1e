"""What decays, and how fast each layer learns."""

import pytest

from pipeline.models import build_model
from pipeline.train.config import OptimConfig
from pipeline.train.optim import parameter_groups


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
