"""LyapEMA: the identity, the certificate against an adversary, and the limits where it is something known."""

import itertools
import math

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from pipeline.ssl.config import LyapEMAConfig
from pipeline.ssl.lyapema import MEASURE_EVERY, LyapEMA

NO_WARMUP = {"warmup_steps": 0}


def student(dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], torch.optim.SGD]:
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(n, dtype=dtype)) for n in (7, 100, 1)]
    return weights, torch.optim.SGD(weights, lr=1.0)


def move(weights: list[Tensor], optimizer: torch.optim.SGD, size: float, towards: list[Tensor] | None = None) -> None:
    """One optimizer step of length about `size`: at random, or straight away from `towards`."""
    for i, w in enumerate(weights):
        away = torch.randn_like(w) if towards is None else (w - towards[i]).detach() + 1e-12 * torch.randn_like(w)
        w.grad = -size * away / away.norm().clamp(min=1e-30) / math.sqrt(len(weights))
    optimizer.step()


def energy(ema: LyapEMA) -> float:
    return sum(float((s.detach() - t).double().square().sum()) for s, t in ema.teacher.items()) / 2


@pytest.mark.parametrize("mode", ["ema", "lyap", "guarded"])
def test_energy_after_is_half_alpha_squared_distance_squared(mode: str) -> None:
    weights, optimizer = student()
    ema = LyapEMA(weights, optimizer, LyapEMAConfig(mode=mode, **NO_WARMUP))
    for step in range(50):
        move(weights, optimizer, 0.1 * (1 + step % 7))
        report = ema.update()
        expected = 0.5 * (report["ema/alpha"].total * report["ema/d"].total) ** 2
        assert energy(ema) == pytest.approx(float(expected), rel=1e-9)
        assert float(report["ema/V"].total) == pytest.approx(energy(ema), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_guard_keeps_its_certificate_against_an_adversary(dtype: torch.dtype) -> None:
    """V' <= max(V, R²/2) at every step, whatever the student does; the plain rule on the same moves breaks it.

    V is measured on the stored numbers in float64 (whose own rounding is the slack): the guard covers that of fp32.
    """
    violations = {"lyap": 0, "guarded": 0}
    for mode in violations:
        weights, optimizer = student(dtype)
        ema = LyapEMA(weights, optimizer, LyapEMAConfig(mode=mode, radius_steps=2.0, **NO_WARMUP))
        generator = torch.Generator().manual_seed(1)
        before = 0.0
        for step in range(1000):
            size = float(torch.rand((), generator=generator)) * 10 ** float(
                torch.randint(-3, 2, (), generator=generator)
            )
            move(weights, optimizer, size, towards=None if step % 3 else list(ema.teacher.values()))
            ema.update()
            radius = 2.0 * float(ema.mean_step)
            violations[mode] += energy(ema) > max(before, radius**2 / 2) * (1 + 1e-14)
            before = energy(ema)
    assert violations["guarded"] == 0
    assert violations["lyap"] > 0


@pytest.mark.parametrize("mode", ["ema", "lyap"])
@pytest.mark.parametrize("pull", [0.0, 0.1])
def test_steps_of_bounded_length_leave_a_bounded_distance(mode: str, pull: float) -> None:
    """|r| <= A m / (1 - A (1 - lambda)) in the limit, from within and from without, and a student that flees reaches it."""
    decay, length = 0.9, 0.5
    bound = decay * length / (1 - decay * (1 - pull))
    for start in (0.0, 3.0):
        weights, optimizer = student()
        rule = {"base_decay": decay} if mode == "ema" else {"base_decay": 0.5, "max_decay": decay, "gamma": 100.0}
        ema = LyapEMA(weights, optimizer, LyapEMAConfig(mode=mode, pull=pull, **rule, **NO_WARMUP))
        for s, t in ema.teacher.items():
            t.copy_(s.detach() + start * bound / math.sqrt(s.numel() * len(weights)))
        for _ in range(150):
            before = math.sqrt(2 * energy(ema))
            move(weights, optimizer, length, towards=list(ema.teacher.values()))
            ema.update()
            assert math.sqrt(2 * energy(ema)) <= decay * ((1 - pull) * before + length) * (1 + 1e-9)
        assert math.sqrt(2 * energy(ema)) == pytest.approx(bound, rel=0.05)


def test_without_sensitivity_and_pull_it_is_a_plain_average() -> None:
    weights, optimizer = student()
    ema = LyapEMA(weights, optimizer, LyapEMAConfig(mode="lyap", gamma=0.0, base_decay=0.9, **NO_WARMUP))
    plain = [w.detach().clone() for w in weights]
    for _ in range(20):
        move(weights, optimizer, 1.0)
        ema.update()
        plain = [0.9 * p + 0.1 * w.detach() for p, w in zip(plain, weights, strict=True)]
    for teacher, expected in zip(ema.teacher.values(), plain, strict=True):
        torch.testing.assert_close(teacher, expected, rtol=1e-9, atol=1e-12)


def test_the_supplements_rule_is_a_half_where_student_and_teacher_agree() -> None:
    weights, optimizer = student()
    paper = LyapEMAConfig(mode="lyap", norm="l2", gamma=1.0, base_decay=0.5, max_decay=1.0, **NO_WARMUP)
    assert LyapEMAConfig(preset="supplement", gamma=1.0, pull=0.0) == paper.model_copy(update={"preset": "supplement"})
    ema = LyapEMA(weights, optimizer, paper)
    assert float(ema.update()["ema/alpha"].total) == 0.5
    move(weights, optimizer, 2.0)
    report = ema.update()
    distance = float(report["ema/d"].total)
    assert float(report["ema/alpha"].total) == pytest.approx(1 / (1 + math.exp(-distance)), rel=1e-9)


def test_a_far_student_still_moves_the_teacher() -> None:
    """sigmoid(30) is one in fp32; one minus it must not be zero."""
    weights, optimizer = student()
    ema = LyapEMA(
        weights,
        optimizer,
        LyapEMAConfig(mode="lyap", norm="l2", gamma=1.0, base_decay=0.5, max_decay=1 - 1e-16, **NO_WARMUP),
    )
    move(weights, optimizer, 30.0)
    before = [t.clone() for t in ema.teacher.values()]
    ema.update()
    assert sum(float((t - b).abs().sum()) for t, b in zip(ema.teacher.values(), before, strict=True)) > 0


def test_the_pull_moves_the_student_by_lambda_towards_the_teacher() -> None:
    weights, optimizer = student()
    ema = LyapEMA(weights, optimizer, LyapEMAConfig(pull=0.25))
    for t in ema.teacher.values():
        t.add_(1.0)
    start = [w.detach().clone() for w in weights]
    for w in weights:
        w.grad = torch.zeros_like(w)
    optimizer.step()
    for w, s in zip(weights, start, strict=True):
        torch.testing.assert_close(w.detach(), s + 0.25)


def test_a_restored_teacher_takes_the_very_same_next_step() -> None:
    weights, optimizer = student(torch.float32)
    ema = LyapEMA(weights, optimizer, LyapEMAConfig(warmup_steps=3))
    for _ in range(10):
        move(weights, optimizer, 1.0)
        ema.update()
    twin_weights = [torch.nn.Parameter(w.detach().clone()) for w in weights]
    twin_optimizer = torch.optim.SGD(twin_weights, lr=1.0)
    twin = LyapEMA(twin_weights, twin_optimizer, LyapEMAConfig(warmup_steps=3))
    for new, old in zip(twin.teacher.values(), ema.teacher.values(), strict=True):
        new.copy_(old)
    twin.load_state_dict(ema.state_dict())
    torch.manual_seed(5)
    move(weights, optimizer, 1.0)
    torch.manual_seed(5)
    move(twin_weights, twin_optimizer, 1.0)
    first, second = ema.update(), twin.update()
    assert {k: float(v.total) for k, v in first.items()} == {k: float(v.total) for k, v in second.items()}
    assert all(torch.equal(a, b) for a, b in zip(ema.teacher.values(), twin.teacher.values(), strict=True))


def test_the_supplements_preset_wants_what_the_supplement_does_not_print() -> None:
    with pytest.raises(ValidationError, match="needs gamma and pull: the source prints no value"):
        LyapEMAConfig(preset="supplement")
    with pytest.raises(ValidationError, match="needs pull"):
        LyapEMAConfig(preset="supplement", gamma=1.0)
    with pytest.raises(ValidationError, match="preset supplement decides it"):
        LyapEMAConfig(preset="supplement", gamma=1.0, pull=1e-3, norm="lag")


@pytest.mark.parametrize(
    "values", [{"base_decay": 0.999}, {"base_decay": 0.9999}, {"base_decay": 0.2, "min_decay": 0.5}]
)
def test_a_decay_that_would_always_be_clamped_is_refused(values: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match="clamped to a constant"):
        LyapEMAConfig(mode="lyap", **values)
    assert LyapEMAConfig(mode="ema", **values).base_decay == values["base_decay"]


def test_the_decay_rises_with_the_fall_of_energy_and_falls_with_its_rise() -> None:
    weights, optimizer = student()
    config = LyapEMAConfig(mode="lyap", signal="energy", norm="l2", gamma=1.0, base_decay=0.5, **NO_WARMUP)
    ema = LyapEMA(weights, optimizer, config)
    for towards in (None, list(ema.teacher.values()), None):
        r = float(ema.radius)
        move(weights, optimizer, 0.3 if towards is None else -0.1, towards)
        report = ema.update()
        fall = (r**2 - float(report["ema/d"].total) ** 2) / 2
        assert (fall > 0) == (towards is not None)
        assert float(report["ema/alpha"].total) == pytest.approx(1 / (1 + math.exp(-fall)), rel=1e-9)


def test_a_ramped_average_begins_and_ends_at_its_decays() -> None:
    weights, optimizer = student()
    config = LyapEMAConfig(mode="ema", base_decay=0.9, final_decay=0.99, ramp_steps=10, **NO_WARMUP)
    ema = LyapEMA(weights, optimizer, config)
    decays = [float(ema.update()["ema/alpha"].total) for _ in range(13)]
    assert decays == sorted(decays)
    assert decays[0] == pytest.approx(0.9)
    assert decays[5] == pytest.approx(0.945)
    assert decays[10:] == pytest.approx([0.99] * 3)


@pytest.mark.parametrize(
    ("settings", "copies"),
    [
        ({"mode": "ema"}, 0),
        ({"mode": "lyap", "norm": "l2"}, 0),
        ({"mode": "lyap", "norm": "lag"}, MEASURE_EVERY + 1),
        ({"mode": "guarded"}, MEASURE_EVERY + 1),
    ],
)
def test_the_masters_are_copied_only_where_a_step_is_measured(settings: dict, copies: int) -> None:
    weights, optimizer = student()
    ema = LyapEMA(weights, optimizer, LyapEMAConfig(**settings))
    taken = 0
    for _ in range(MEASURE_EVERY + 2):
        for w in weights:
            w.grad = torch.ones_like(w)
        ema._before_step(optimizer)
        taken += bool(ema._before)
        ema._after_step(optimizer)
        ema.update()
    assert taken == copies


def test_w_is_the_loss_and_the_proximal_term_of_the_step() -> None:
    weights, optimizer = student()
    ema = LyapEMA(weights, optimizer, LyapEMAConfig(mode="lyap", pull=0.25, **NO_WARMUP))
    for _ in range(3):
        before = energy(ema)
        move(weights, optimizer, 1.0)
        w = float(ema.update(torch.tensor(2.0))["ema/W"].total)
        assert w == pytest.approx(2.0 + 0.25 / 1.0 * before, rel=1e-9)  # lambda / 2 eta |r|², eta = 1


def test_w_falls_on_a_fixed_smooth_loss_while_v_does_not() -> None:
    """Eq. (3) is gradient descent on W: never up, for any decay, where eta beta + lambda <= 1."""
    torch.manual_seed(0)
    hessian = torch.linspace(0.1, 1.0, 20, dtype=torch.float64)
    weights = [torch.nn.Parameter(torch.randn(20, dtype=torch.float64))]
    eta, pull = 0.8, 0.2
    optimizer = torch.optim.SGD(weights, lr=eta)
    ema = LyapEMA(weights, optimizer, LyapEMAConfig(mode="lyap", norm="l2", gamma=0.5, pull=pull, **NO_WARMUP))
    values, rises = [], 0
    for _ in range(100):
        loss = (hessian * weights[0] ** 2).sum() / 2
        (weights[0].grad,) = torch.autograd.grad(loss, weights)
        optimizer.step()
        report = ema.update(loss.detach())
        values.append(float(report["ema/W"].total))
        rises += float(report["ema/delta_V"].total) > 0
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in itertools.pairwise(values))
    assert rises > 0
