"""A model that the schema allows and no machine holds is refused before it is built."""

import time

import psutil
import pytest
import torch

from pipeline.errors import ConfigError
from pipeline.models import build_model
from pipeline.models.memory import build_within_memory

HUGE = {
    "vim_nano": {"embed_dim": 2**15, "depth": 512},
    "efficientvim_m1": {"widths": (2**15,) * 3, "depths": (64,) * 3, "states": (2**15,) * 3},
    "vssd_micro": {"width": 2**14, "depths": (64,) * 4, "heads": (64,) * 4},
    "timm/vit_tiny_patch16_224": {"options": {"embed_dim": 2**15, "depth": 256, "num_heads": 64}},
}


@pytest.mark.parametrize("name", HUGE)
def test_a_model_of_terabytes_is_refused_with_both_numbers(name: str) -> None:
    before = psutil.Process().memory_info().rss
    began = time.process_time()
    with pytest.raises(ConfigError, match=rf"model {name} has \S+ weights and needs \S+ GB of memory .* GB free"):
        build_model(name, **HUGE[name])
    assert psutil.Process().memory_info().rss - before < 2**29
    assert time.process_time() - began < 20


def test_asking_for_the_size_draws_no_random_numbers() -> None:
    torch.manual_seed(0)
    first = build_model("vim_nano", depth=1)
    torch.manual_seed(0)
    second = build_within_memory(lambda: build_model("vim_nano", depth=1), "it", trained=True)
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
