"""EfficientViM: published counts, timm's models as oracle, the mixer against its definition, Proposition 1, fusion, export."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import ConfigError, EnvironmentProblem
from pipeline.evaluate.speed import packed_form
from pipeline.models import build_model, vssd
from pipeline.models.efficientvim.fused import fuse
from pipeline.models.efficientvim.mixers import NCSSD, Attention, ChannelNorm
from pipeline.models.efficientvim.packed import pack
from pipeline.models.layers import HSMSSD, read_states
from pipeline.ops.native import build
from pipeline.ops.native.vision_library import vision_library
from pipeline.ops.torchvision_cpu import allow_torchvision

PARAMETERS = {
    "m1": 6_679_458, "m2": 13_903_842, "m3": 16_604_174, "m4": 19_606_505,
    "m1_dist": 7_643_462, "m2_dist": 15_315_846, "m3_dist": 18_176_178, "m4_dist": 21_178_509,
}  # fmt: skip
SLOW = ("m1_dist", "m2_dist", "m3_dist", "m4")  # only in `make soak`
# Millions of multiply-adds as published; at the size the variant is trained at.
FLOPS = {"m1": 239, "m2": 355, "m3": 656, "m4": 1111}
# Rows of Table C on M2: (fields, parameters and FLOPs as printed). Row C's setting is not published: with M2's states the
# count is 387 M, with 25 everywhere 382.
TABLE_C = {
    "A": ({}, "13.9M/355M"),
    "C": ({"mixer": "ncssd", "fusion": "none", "states": (25, 25, 25)}, "13.0M/382M"),
    "D": ({"mixer": "attention", "fusion": "none"}, "13.6M/416M"),
    "E": ({"importance": "multihead"}, "13.9M/352M"),
    "F": ({"importance": "vector"}, "13.9M/352M"),
    "G": ({"fusion": "map"}, "13.4M/355M"),
    "H": ({"fusion": "none"}, "13.0M/354M"),
    "I": ({"states": (9, 25, 49)}, "14.0M/407M"),
    "J": ({"states": (25, 25, 25)}, "13.9M/373M"),
    "L": ({"norm": "bn"}, "13.9M/355M"),
}


def randomised(model: nn.Module) -> nn.Module:
    """Put a model in eval mode, with every gate, norm and statistic at a value that matters."""
    for name, p in model.named_parameters():
        if name.endswith("alpha"):
            nn.init.normal_(p)
        elif name.startswith(("norm", "weights")) or ".norm." in name or name.endswith("mixer.D"):
            nn.init.normal_(p, 1.0, 0.3)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    return model.eval()


def multiply_adds(model: nn.Module, size: tuple[int, int]) -> float:
    """Count millions of multiply-adds as published (fvcore): convolutions, linear maps, matrix products, 1 for a normed value."""
    total = 0.0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Conv1d | nn.Conv2d):
            total += output.numel() * module.weight[0].numel()
        elif isinstance(module, nn.Linear):
            total += output.numel() * module.in_features
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            total += output.numel()
        elif isinstance(module, HSMSSD | NCSSD):  # into the states and out of them
            tokens = inputs[0].numel() // module.BCdt_proj.conv.in_channels
            width = (
                module.out_proj.conv.out_channels if isinstance(module, HSMSSD) else module.out_proj.conv.in_channels
            )
            total += 2 * tokens * width * module.rows[0]
        elif isinstance(module, vssd.NCSSD):
            total += 2 * inputs[0][..., 0].numel() * module.inner * module.states
        elif isinstance(module, Attention | vssd.Attention):
            heads_last = isinstance(module, vssd.Attention)
            tokens = inputs[0][..., 0].numel() if heads_last else inputs[0][:, 0].numel()
            total += 2 * tokens * inputs[0].numel()

    hooks = [m.register_forward_hook(count) for m in model.modules()]
    with torch.no_grad(), torch.device("meta"):
        model(torch.zeros(1, 3, *size))
    for hook in hooks:
        hook.remove()
    return total / 1e6


def meta(name: str, **fields) -> nn.Module:
    with torch.device("meta"):
        return build_model(name, **fields).eval()


@pytest.mark.parametrize(("variant", "count"), PARAMETERS.items())
def test_parameters_are_the_published_ones_to_the_unit(variant: str, count: int) -> None:
    assert sum(p.numel() for p in meta(f"efficientvim_{variant}").parameters()) == count


@pytest.mark.parametrize(("variant", "published"), FLOPS.items())
def test_flops_are_within_a_percent_of_the_published_ones(variant: str, published: int) -> None:
    model = meta(f"efficientvim_{variant}")
    assert multiply_adds(model, model.image_size) == pytest.approx(published, rel=0.01)


@pytest.mark.parametrize(("size", "published"), [((384, 384), 2379), ((512, 512), 4154)])
def test_the_flops_of_fine_tuned_m4_are_table_bs(size: tuple[int, int], published: int) -> None:
    assert multiply_adds(meta("efficientvim_m4"), size) == pytest.approx(published, rel=0.01)


@pytest.mark.parametrize("row", TABLE_C)
def test_table_c_has_the_published_size(row: str) -> None:
    fields, published = TABLE_C[row]
    model = meta("efficientvim_m2", **fields)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    parameters, flops = (float(x.removesuffix("M")) for x in published.split("/"))
    assert float(f"{millions:.1f}") == parameters
    assert multiply_adds(model, (224, 224)) == pytest.approx(flops, rel=0.01)


@pytest.mark.parametrize(
    ("name", "millions", "giga"),
    [
        ("vssd_micro", 13.513, None),
        ("vssd_tiny", 24.271, None),
        ("vssd_small", 40.076, None),
        ("vssd_base", 88.823, None),
        ("vssd_tiny_hsm", 24.37, 3.734),
    ],
)
def test_vssd_and_table_d_have_the_published_size(name: str, millions: float, giga: float | None) -> None:
    """Parameters agree for all; FLOPs agree for Table D's row.

    VSSD's own FLOPs (2.306 and 4.475 G for micro and tiny) lie between our count with the products of its mixers (2.389, 4.666)
    and without them; how they were counted is not known."""
    model = meta(name)
    digits = len(str(millions).split(".")[1])
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, digits) == millions
    if giga:
        assert multiply_adds(model, (224, 224)) / 1e3 == pytest.approx(giga, rel=0.01)


@pytest.mark.parametrize(
    "variant", [*("m1", "m2", "m3", "m4_dist"), *(pytest.param(v, marks=pytest.mark.soak) for v in SLOW)]
)
def test_logits_equal_timms_with_its_weights_and_ours(variant: str) -> None:
    """Weights load strictly in both directions; images are not square; the fused and packed forms agree too."""
    allow_torchvision()
    import timm

    torch.manual_seed(0)
    ours, theirs = build_model(f"efficientvim_{variant}"), timm.create_model(f"efficientvim_{variant}")
    ours.load_state_dict(randomised(theirs).state_dict())
    theirs.load_state_dict(ours.eval().state_dict())
    images = torch.randn(2, 3, 96, 160)
    with torch.no_grad():
        want = theirs(images)
        for model in (ours, fuse(ours), pack(ours)):
            torch.testing.assert_close(model(images), want, rtol=0, atol=1e-5)


FUSIBLE = [*({**fields} for fields, _ in TABLE_C.values()), {"distilled": True}, {"expand": 2}]


@pytest.mark.parametrize("fields", FUSIBLE, ids=str)
def test_fusing_and_packing_change_no_logits_of_any_ablation(fields: dict) -> None:
    torch.manual_seed(1)
    small = {"widths": (16, 24, 32), "depths": (1, 2, 1), "image_size": 64, "num_classes": 5}
    if "states" in fields:
        fields = {**fields, "states": (9, 4, 4)}
    model = randomised(build_model("efficientvim_nano", **{"states": (16, 9, 4), **small, **fields}))
    images = torch.randn(3, 3, 50, 70)
    with torch.no_grad():
        want = model(images)
        for fused in (fuse(model), pack(model)):
            torch.testing.assert_close(fused(images), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stride", [4, 8, 16])
@pytest.mark.parametrize("widths", [(128, 32, 48), (224, 32, 48), (48, 32, 40)], ids=str)
def test_packing_keeps_every_stride_of_the_stem(widths: tuple[int, int, int], stride: int) -> None:
    torch.manual_seed(3)
    fields = {"widths": widths, "depths": (1, 1, 1), "image_size": 64, "num_classes": 5, "states": (16, 9, 4)}
    model = randomised(build_model("efficientvim_nano", **fields, stem_stride=stride))
    images = torch.randn(2, 3, 60, 76)
    with torch.no_grad():
        torch.testing.assert_close(pack(fuse(model))(images), model(images), rtol=1e-5, atol=1e-5)


def test_a_closed_gate_is_fused_without_cancellation() -> None:
    """A gate that lets nearly nothing of its input through: 1 - gate is about 1e-9."""
    torch.manual_seed(2)
    model = randomised(build_model("efficientvim_nano", num_classes=5)).double()
    for stage in model.stages:
        for block in stage.blocks:
            block.alpha.data[:, ::3] = 20.0
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(
            fuse(copy.deepcopy(model).float())(images), model(images.double()).float(), rtol=1e-4, atol=1e-5
        )


def test_what_cannot_be_fused_is_refused() -> None:
    with pytest.raises(ConfigError, match="no classifier to fuse"):
        fuse(build_model("efficientvim_nano", num_classes=0).eval())


def test_without_a_compiler_packing_is_refused_and_fusing_works(monkeypatch: pytest.MonkeyPatch) -> None:
    vision_library.cache_clear()
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    fused = fuse(build_model("efficientvim_nano", num_classes=5).eval())
    with pytest.raises(EnvironmentProblem, match=r"no C\+\+ compiler .*; fuse\(\) needs none"):
        pack(fused)
    assert packed_form(fused) is fused


def test_a_packed_model_takes_fp32_and_can_be_copied() -> None:
    packed = pack(build_model("efficientvim_nano", num_classes=5, image_size=32).eval())
    images = torch.randn(2, 3, 32, 32)
    assert packed.image_size == (32, 32)
    assert packed(torch.randn(1, 3, 48, 40)).shape == (1, 5)
    assert torch.equal(copy.deepcopy(packed)(images), packed(images))
    assert torch.equal(packed(images.contiguous(memory_format=torch.channels_last)), packed(images))
    with pytest.raises(ValueError, match=r"takes fp32 on the CPU, not torch\.bfloat16"):
        packed(images.bfloat16())
    for shape in ((2, 1, 32, 32), (3, 32, 32), (1, 3, 32, 0)):
        with pytest.raises(ValueError, match=r"takes images \(B, 3, H, W\), not \("):
            packed(torch.zeros(shape))
    assert packed(images[:0]).shape == (0, 5)
    with pytest.raises(ValueError, match="pack the model anew"):
        packed.to("meta")(images)


class TestMixer:
    def mixer(self, **more) -> HSMSSD:
        torch.manual_seed(0)
        mixer = HSMSSD(8, 16, **{"expand": 1, "importance": "state", "heads": 2, **more}).double()
        mixer.reset_parameters()
        mixer.D.data.fill_(0.7)
        return mixer

    def test_it_equals_its_definition_token_by_token(self) -> None:
        mixer, x = self.mixer(), torch.randn(2, 8, 3, 5, dtype=torch.float64)
        y, h = mixer(x)
        w_bcd, w_hz, w_out = (m.conv.weight[..., 0] for m in (mixer.BCdt_proj, mixer.hz_proj, mixer.out_proj))
        for i in range(2):
            tokens = x[i].flatten(1)
            maps = F.conv2d((w_bcd @ tokens).view(1, -1, 3, 5), mixer.dw.conv.weight, padding=1, groups=48)[0].flatten(
                1
            )
            b, c, dt = maps[:16], maps[16:32], maps[32:]
            states = torch.zeros(8, 16, dtype=torch.float64)
            for n in range(16):
                share = torch.exp(dt[n]) / torch.exp(dt[n]).sum()
                for token in range(15):
                    states[:, n] += share[token] * b[n, token] * tokens[:, token]
            projected = w_hz @ states
            inner, z = projected[:8], projected[8:]
            mixed = w_out @ (inner * z * torch.sigmoid(z) + 0.7 * inner)
            torch.testing.assert_close(h[i], mixed)
            torch.testing.assert_close(y[i].flatten(1), mixed @ c)

    def test_the_offset_A_changes_nothing(self) -> None:
        mixer, x = self.mixer(), torch.randn(2, 8, 4, 4, dtype=torch.float64)
        before = mixer(x)[0]
        mixer.A.data.normal_(0, 5)
        torch.testing.assert_close(mixer(x)[0], before, rtol=0, atol=1e-13)

    @pytest.mark.parametrize("heads", [1, 2, 4])
    def test_a_head_weighs_its_channels(self, heads: int) -> None:
        x, b, a = torch.randn(1, 8, 6), torch.randn(1, 5, 6), torch.rand(1, heads, 6)
        want = torch.stack([(x[0, d] * a[0, d * heads // 8] * b[0]).sum(1) for d in range(8)])
        torch.testing.assert_close(read_states(x, b, a)[0], want)

    def proposition_1(self, c: Tensor, gate: bool = True) -> float:
        """Largest difference between HSM-SSD and NC-SSD with the same projections, importance 1/16 and B = 16 I."""
        mixer, x = self.mixer(), torch.randn(2, 8, 4, 4, dtype=torch.float64)
        b, importance = 16 * torch.eye(16).double()[None], torch.full((1, 16, 16), 1 / 16, dtype=torch.float64)
        tokens = x.flatten(2)
        w_h, w_z = mixer.hz_proj.conv.weight[..., 0].chunk(2)
        weigh = (lambda h, z: h * F.silu(z) + 0.7 * h) if gate else (lambda h, z: h)
        # Hidden states first, read out last, against: read out first, gated for every token.
        states = read_states(tokens, b.expand(2, -1, -1), importance.expand(2, -1, -1))
        hidden = mixer.out_proj(weigh(w_h @ states, w_z @ states)) @ c
        if gate:
            torch.testing.assert_close(mixer.mix(states) @ c, hidden)
        values = read_states(w_h @ tokens, b.expand(2, -1, -1), importance.expand(2, -1, -1)) @ c
        return (mixer.out_proj(weigh(values, w_z @ tokens)) - hidden).abs().max().item()

    def test_proposition_1_a_diagonal_read_out_makes_it_nc_ssd(self) -> None:
        diagonal = torch.diag(torch.rand(16, dtype=torch.float64) + 0.5)
        assert self.proposition_1(diagonal) < 1e-12

    def test_proposition_1_does_not_hold_for_a_dense_read_out(self) -> None:
        torch.manual_seed(3)
        dense = torch.randn(16, 16, dtype=torch.float64)
        assert self.proposition_1(dense) > 0.1
        assert self.proposition_1(dense, gate=False) < 1e-12  # only the gate separates the two


def test_the_norm_is_layer_norm_over_channels() -> None:
    norm, x = ChannelNorm(6), torch.randn(2, 6, 3, 4)
    nn.init.normal_(norm.weight)
    want = F.layer_norm(x.permute(0, 2, 3, 1), (6,), norm.weight, norm.bias).permute(0, 3, 1, 2)
    torch.testing.assert_close(norm(x), want)


def test_a_distilled_model_returns_both_logits_in_training_only_when_asked() -> None:
    model = build_model("efficientvim_nano_dist", num_classes=3)
    images = torch.randn(4, 3, 32, 32)
    assert model(images).shape == (4, 3)
    model.set_distilled_training()
    logits, taught = model(images)
    assert not torch.equal(logits, taught)
    assert model.eval()(images).shape == (4, 3)
    plain = build_model("efficientvim_nano", num_classes=3)
    plain.set_distilled_training()
    assert plain(images).shape == (4, 3)


class TestExport:
    def fused(self) -> nn.Module:
        torch.manual_seed(0)
        return fuse(randomised(build_model("efficientvim_nano_dist", num_classes=5)))

    def test_torch_export_takes_any_batch(self) -> None:
        fused = self.fused()
        batch = torch.export.Dim("batch", min=2, max=64)
        program = torch.export.export(fused, (torch.randn(4, 3, 32, 32),), dynamic_shapes=({0: batch},))
        images = torch.randn(7, 3, 32, 32)
        torch.testing.assert_close(program.module()(images), fused(images), rtol=1e-5, atol=1e-6)

    def test_onnx_runtime_agrees_for_any_batch(self, tmp_path: Path) -> None:
        runtime = pytest.importorskip("onnxruntime", reason="pip install 'visionmamba-pipeline[onnx]'")
        pytest.importorskip("onnx", reason="pip install 'visionmamba-pipeline[onnx]'")
        from pipeline.exports.onnx import write_onnx

        fused = self.fused()
        path = write_onnx(fused, tmp_path / "model.onnx", (32, 32))
        session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
        for number in (1, 7):
            images = torch.randn(number, 3, 32, 32)
            (logits,) = session.run(None, {"images": images.numpy()})
            torch.testing.assert_close(torch.from_numpy(logits), fused(images), rtol=1e-4, atol=1e-5)
