"""What the released code of Semi-ViM does, recomputed here from its formulas: the teacher's rule and its SSMixup."""

import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from pipeline.ssl.config import LyapEMAConfig
from pipeline.ssl.lyapema import LyapEMA
from pipeline.ssl.pseudo_labels import PseudoLabels
from pipeline.ssl.ssmixup import blend_logits, mirrored_pairs
from stages.configs.semi import StageSSMixupConfig

# A recorded trajectory of a student with three weights: the gradient of each step at a learning rate of 0.5, or how far from its
# teacher the student is put. V falls by more than 17 in the second update and is 0 in the seventh: both roll back.
START = np.array([0.3, -1.2, 0.05])
STEPS: list[list[float] | float] = [
    [-40.0, 8.0, 4.0],
    0.01,
    [1.0, -0.5, 0.25],
    [-0.5, 2.0, 0.0],
    [3.0, 3.0, -3.0],
    [0.1, 0.1, 0.1],
    0.0,
    [0.2, -0.4, 0.6],
    [-1.0, 0.3, 0.0],
]
RATE = 0.5


def reference(kappa: float, pull: float) -> list[dict[str, float | np.ndarray]]:
    """Follow the released rule literally in float64, with the fp32 sigmoid that decides about the rollback."""
    student, teacher, rate, before, rows = START.copy(), START.copy(), RATE, None, []
    for taken in STEPS:
        if isinstance(taken, float):
            student = teacher + taken
        else:
            applied = np.array(taken) + 2 * pull * (student - teacher)
            student = student - rate * applied
        energy = 0.5 * ((student - teacher) ** 2).sum()
        before = energy if before is None else before
        argument = -kappa * (energy - before)
        alpha = 1 / (1 + math.exp(-argument))
        moved = alpha * teacher + (1 - alpha) * student
        rounded = float(1 / (np.float32(1) + np.exp(np.float32(-argument))))
        if 0.5 * ((rounded * (student - teacher)) ** 2).sum() >= energy:
            moved, rate, kappa = teacher, rate * 0.5, kappa * 1.5
        teacher = moved
        before = 0.5 * ((student - teacher) ** 2).sum()
        rows.append({"student": student, "teacher": teacher, "alpha": alpha, "V": before, "rate": rate / RATE})
    return rows


@pytest.mark.parametrize(("kappa", "pull"), [(1.0, 0.0), (2.0, 0.05)])
def test_the_released_rule_step_by_step(kappa: float, pull: float) -> None:
    weights = [torch.nn.Parameter(torch.tensor(START[:2])), torch.nn.Parameter(torch.tensor(START[2:]))]
    optimizer = torch.optim.SGD(weights, lr=RATE)
    given = {} if kappa == 1 and pull == 0 else {"gamma": kappa, "pull": pull}
    ema = LyapEMA(weights, optimizer, LyapEMAConfig(preset="released", **given))
    rows = reference(kappa, pull)
    for taken, want in zip(STEPS, rows, strict=True):
        if isinstance(taken, float):
            with torch.no_grad():
                for weight in weights:
                    weight.copy_(ema.teacher[weight] + taken)
        else:
            whole = torch.tensor(taken, dtype=torch.float64)
            weights[0].grad, weights[1].grad = whole[:2], whole[2:]
            optimizer.step()
            assert optimizer.param_groups[0]["lr"] == RATE  # the schedule's own rate is left as it was
        report = {name: float(mean.total) for name, mean in ema.update().items()}
        np.testing.assert_allclose(torch.cat(weights).detach(), want["student"], rtol=1e-12)
        np.testing.assert_allclose(torch.cat(list(ema.teacher.values())), want["teacher"], rtol=1e-12)
        assert report["ema/V"] == pytest.approx(want["V"], rel=1e-9, abs=1e-30)
        assert report["ema/lr_factor"] == want["rate"]
        if report["ema/alpha"] != 1:
            assert report["ema/alpha"] == pytest.approx(want["alpha"], rel=1e-12)
    assert [row["rate"] for row in rows] == [1, *[0.5] * 5, *[0.25] * 3]


def test_the_first_released_decay_is_a_half_exactly() -> None:
    weight = torch.nn.Parameter(torch.zeros(5, dtype=torch.float64))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    ema = LyapEMA([weight], optimizer, LyapEMAConfig(preset="released"))
    weight.grad = torch.full_like(weight, 7.0)
    optimizer.step()
    assert float(ema.update()["ema/alpha"].total) == 0.5
    assert float(ema.rollbacks) == 0


def test_rollbacks_survive_a_restore() -> None:
    weight = torch.nn.Parameter(torch.zeros(5))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    ema = LyapEMA([weight], optimizer, LyapEMAConfig(preset="released"))
    for _ in range(3):
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
        ema.update()
    twin_weight = torch.nn.Parameter(torch.zeros(5))
    twin = LyapEMA([twin_weight], torch.optim.SGD([twin_weight], lr=1.0), LyapEMAConfig(preset="released"))
    twin.load_state_dict(ema.state_dict())
    for w, e in ((weight, ema), (twin_weight, twin)):
        w.grad = torch.ones_like(w)
        e.optimizer.step()
    assert torch.equal(weight, twin_weight)
    assert float(weight.detach()[0]) == -(0.5**3)  # three rollbacks: an eighth of the rate


def test_a_preset_refuses_what_it_decides() -> None:
    with pytest.raises(ValidationError, match="preset released decides it"):
        LyapEMAConfig(preset="released", signal="discrepancy")
    with pytest.raises(ValidationError, match="rollback works in mode lyap only"):
        LyapEMAConfig(mode="guarded", rollback=True)
    assert LyapEMAConfig(preset="released", gamma=3.0).gamma == 3.0


def test_the_released_ssmixup_is_its_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    forward, backward = (torch.randn(4, 3, dtype=torch.float64, generator=generator) for _ in range(2))
    strong = torch.rand(4, 3, 2, 2, dtype=torch.float64, generator=generator)
    confidence = torch.tensor([0.97, 0.5, 0.96, 0.99], dtype=torch.float64)
    labels, partner = torch.tensor([0, 1, 2, 0]), torch.tensor([2, 3, 0, 1])
    targets = torch.eye(3, dtype=torch.float64)[labels]
    pseudo = PseudoLabels(targets, labels, confidence, (confidence >= 0.95).double())
    psi = confidence / (confidence + confidence[partner] + 1e-8)
    nu, losses = 1.0, []
    for i, j in enumerate(partner.tolist()):
        logits = []
        for f, b in zip(forward[i].tolist(), backward[i].tolist(), strict=True):
            gate = (f - b) / (1 + math.exp(-(f - b)))
            logits.append(gate * f + gate * b + nu * (float(psi[i]) * f + (1 - float(psi[i])) * b))
        total = math.log(sum(map(math.exp, logits)))
        wanted = float(psi[i]) * (total - logits[labels[i]]) + (1 - float(psi[i])) * (total - logits[labels[j]])
        if confidence[i] >= 0.95 and confidence[j] >= 0.95:
            losses.append(wanted)
    pairs = mirrored_pairs(strong, pseudo, partner, psi, nu)
    assert len(losses) == 2
    assert float(pairs.loss(forward, backward)) == pytest.approx(sum(losses) / 2, rel=1e-12)
    torch.testing.assert_close(pairs.images[1], psi[1] * strong[1] + (1 - psi[1]) * strong[3])
    agreeing = blend_logits(forward, forward, psi, nu)
    torch.testing.assert_close(agreeing, forward)  # the gate closes where both directions agree


def test_the_released_ssmixup_wants_a_number_and_touches_no_block() -> None:
    with pytest.raises(ValidationError, match=r"needs a number for ssmixup\.nu"):
        StageSSMixupConfig(axis="logits")
    with pytest.raises(ValidationError, match="leave out layers"):
        StageSSMixupConfig(axis="logits", nu=1.0, layers=1)
