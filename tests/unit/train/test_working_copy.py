"""What is gathered together under ZeRO-3: every parameter in one block, once."""

import torch
from torch import nn

from pipeline.models import build_model
from pipeline.train.working_copy import blocks_of


def test_every_parameter_is_in_exactly_one_block() -> None:
    timm = {"image_size": 32, "options": {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}}
    for name, more, count in (
        ("vim_nano", {}, 4),
        ("timm/vit_tiny_patch16_224", timm, 2),
        ("efficientvim_nano", {}, 0),
    ):
        with torch.device("meta"):
            model: nn.Module = build_model(name, num_classes=3, **more)
        found = [name for _, parameters in blocks_of(model) for name in parameters]
        assert sorted(found) == sorted(name for name, _ in model.named_parameters())
        whole, rest = blocks_of(model)[:-1], blocks_of(model)[-1]
        assert rest[0] is model
        assert len(whole) >= count
        assert max(len(parameters) for _, parameters in whole) < len(found)
