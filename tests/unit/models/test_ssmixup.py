"""SSMixup agrees with a literal reference that materialises every state, and is the plain block where it should be."""

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from pipeline.models import build_model
from pipeline.models.config import SSMixupConfig, VisionMambaConfig
from pipeline.models.vision_mamba.mixer import Mixer

DIM, TOKENS = 12, 11


def states(x: Tensor, mixer: Mixer, suffix: str) -> tuple[Tensor, Tensor, Tensor]:
    """(inputs v, all states h (B, L, E, N), C (B, L, N)) of one direction run from the first token to the last."""
    own = mixer.get_parameter
    weight, bias = own(f"conv1d{suffix}.weight"), own(f"conv1d{suffix}.bias")
    padded = F.pad(x.transpose(1, 2), (weight.shape[-1] - 1, 0))
    v = F.silu(F.conv1d(padded, weight, bias, groups=weight.shape[0])).transpose(1, 2)
    low, B, C = (v @ own(f"x_proj{suffix}.weight").T).split([mixer.rank, mixer.d_state, mixer.d_state], dim=-1)
    dt = F.softplus(low @ own(f"dt_proj{suffix}.weight").T + own(f"dt_proj{suffix}.bias"))
    A = -torch.exp(own(f"A{suffix}_log"))
    h, all_states = x.new_zeros(len(x), mixer.inner, mixer.d_state), []
    for t in range(x.shape[1]):
        h = torch.exp(dt[:, t, :, None] * A) * h + (dt[:, t] * v[:, t])[..., None] * B[:, t, None, :]
        all_states.append(h)
    return v, torch.stack(all_states, 1), C


def literal(mixer: Mixer, inputs: Tensor, psi: Tensor, nu: Tensor, readout: str, columns: Tensor | None) -> Tensor:
    """The README's equation with its hidden states, token by token."""
    orders = [torch.arange(inputs.shape[1])] + ([columns[0]] if columns is not None else [])
    total: Tensor | float = 0.0
    for k, order in enumerate(orders):
        x, z = mixer.in_proj(inputs[:, order]).chunk(2, dim=-1)
        forward, backward = mixer.suffixes[2 * k : 2 * k + 2]
        v_f, h_f, C_f = states(x, mixer, forward)
        v_b, h_b, C_b = (t.flip(1) for t in states(x.flip(1), mixer, backward))
        y_f = (h_f * C_f[:, :, None]).sum(-1) + mixer.get_parameter(f"D{forward}") * v_f
        y_b = (h_b * C_b[:, :, None]).sum(-1) + mixer.get_parameter(f"D{backward}") * v_b
        w = psi[:, None, None, None]
        if readout == "shared_C":
            mixed = ((w * h_f + (1 - w) * h_b) * C_f[:, :, None]).sum(-1)
        else:
            mixed = (w * h_f * C_f[:, :, None] + (1 - w) * h_b * C_b[:, :, None]).sum(-1)
        y = F.silu(z) * y_f + F.silu(z) * y_b + nu * mixed
        total = total + y[:, order.argsort()]
    return mixer.out_proj(total / len(mixer.suffixes))


def mixer_of(directions: int, **settings: object) -> tuple[Mixer, Tensor | None]:
    torch.manual_seed(0)
    mixer = Mixer(
        DIM, d_state=5, d_conv=4, expand=2, directions=directions, ssmixup=SSMixupConfig.model_validate(settings)
    )
    mixer.reset_scan_parameters()
    order = torch.randperm(TOKENS)
    return mixer, torch.stack([order, order.argsort()]) if directions == 4 else None


@pytest.mark.parametrize("nu", ["learned", 0.7])
@pytest.mark.parametrize("readout", ["own_C", "shared_C"])
@pytest.mark.parametrize("directions", [2, 4])
def test_it_is_the_literal_formula_in_value_and_gradient(directions: int, readout: str, nu: str | float) -> None:
    mixer, columns = mixer_of(directions, nu=nu, readout=readout)
    psi = torch.tensor([0.2, 0.9, 1.0])
    inputs = torch.randn(3, TOKENS, DIM)
    strength = torch.tensor([0.7])
    if nu == "learned":
        with torch.no_grad():
            strength = mixer.nu.fill_(0.7)
    results = []
    for oracle in (True, False):
        mixer.zero_grad()
        x = inputs.clone().requires_grad_()
        if oracle:
            y = literal(mixer, x, psi, mixer.nu if nu == "learned" else strength, readout, columns)
        else:
            y = mixer(x, columns, torch.stack([psi, 1 - psi], 1))
        (y.square() + y).sum().backward()
        results.append([y.detach(), x.grad, *(p.grad for p in mixer.parameters())])
    assert len(results[0]) == len(results[1])
    for want, got in zip(*results, strict=True):
        assert want is not None
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize("readout", ["own_C", "shared_C"])
@pytest.mark.parametrize("nu", ["learned", 0.0])
@pytest.mark.parametrize("directions", [2, 4])
def test_without_strength_it_is_the_plain_block_bit_for_bit(directions: int, nu: str | float, readout: str) -> None:
    mixer, columns = mixer_of(directions, nu=nu, readout=readout)
    x = torch.randn(3, TOKENS, DIM)
    assert torch.equal(mixer(x, columns, torch.rand(3, 2)), mixer(x, columns))


def test_images_without_the_term_are_as_in_the_plain_block() -> None:
    mixer, _ = mixer_of(2, nu=0.5)
    x = torch.randn(4, TOKENS, DIM)
    blend = torch.tensor([[0.3, 0.7], [0.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    mixed, plain = mixer(x, None, blend), mixer(x, None)
    torch.testing.assert_close(mixed[1::2], plain[1::2], rtol=1e-6, atol=1e-7)
    assert (mixed - plain)[::2].abs().amax((1, 2)).min() > 1e-4


def test_only_the_chosen_blocks_have_it_and_only_where_a_confidence_is_given() -> None:
    torch.manual_seed(0)
    model = build_model("vim_nano", num_classes=3, ssmixup={"layers": 2}).eval()
    assert [n for n, _ in model.named_parameters() if n.endswith(".nu")] == [f"layers.{i}.mixer.nu" for i in (2, 3)]
    images = torch.randn(2, 3, 32, 32)
    plain = model(images)
    blend = torch.full((2, 2), 0.5)
    assert torch.equal(model(images, blend), plain)
    with torch.no_grad():
        for layer in model.layers[2:]:
            layer.mixer.nu.fill_(0.5)
    assert torch.equal(model(images), plain)
    assert not torch.equal(model(images, blend), plain)
    always = build_model("vim_nano", num_classes=3, ssmixup={"layers": 2, "everywhere": True}).eval()
    always.load_state_dict(model.state_dict())
    assert torch.equal(always(images), model(images, blend))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"directions": 1, "ssmixup": {}}, "directions 2 or 4, not 1"),
        ({"ssmixup": {"layers": [1, 9]}}, r"must lie in 1 to depth 4"),
        ({"ssmixup": {"layers": 5}}, r"must lie in 1 to depth 4"),
    ],
)
def test_what_cannot_be_blended_is_refused(settings: dict, sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        VisionMambaConfig(name="vim_nano", **settings)
