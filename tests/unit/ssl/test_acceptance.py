"""SoftMatch, FreeMatch and the running means that they follow, against literal float64 loops over the papers' equations."""

import math

import pytest
import torch

from pipeline.ssl.acceptance import RULES, fairness
from pipeline.ssl.config import PseudoLabelRule
from pipeline.ssl.pseudo_labels import PseudoLabeller
from pipeline.ssl.running_means import RunningMeans
from tests.ranks import run_ranks

CLASSES, MOMENTUM = 4, 0.9
PRIOR = torch.full((CLASSES,), 1 / CLASSES, dtype=torch.float64)


def trajectory(steps: int = 30, images: int = 12) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    tilt = torch.tensor([2.0, 0.5, 0.0, -1.0])
    return [2 * torch.randn(images, CLASSES, generator=generator) + tilt for _ in range(steps)]


def probabilities(logits: torch.Tensor) -> list[list[float]]:
    rows = []
    for row in logits.double().tolist():
        powers = [math.exp(value) for value in row]
        rows.append([power / sum(powers) for power in powers])
    return rows


def test_softmatch_is_the_truncated_gaussian_around_the_running_mean_with_uniform_alignment() -> None:
    """Alignment changes the weight and its mean and variance, never the pseudo-label."""
    rule = PseudoLabelRule(
        thresholds="softmatch", momentum=MOMENTUM, sigmas=2.0, alignment="uniform", aligned="confidence"
    )
    labeller = PseudoLabeller(PRIOR, rule)
    mu, variance, mean = 1 / CLASSES, 1.0, [1 / CLASSES] * CLASSES
    between = 0
    for logits in trajectory():
        rows, sure = probabilities(logits), []
        for row in rows:
            scaled = [p / CLASSES / m for p, m in zip(row, mean, strict=True)]
            sure.append(max(scaled) / sum(scaled))
        want = [1.0 if c >= mu else math.exp(-4 * (c - mu) ** 2 / (2 * variance)) for c in sure]
        found = labeller.label(logits)
        torch.testing.assert_close(
            found.accepted.double(), torch.tensor(want, dtype=torch.float64), rtol=1e-4, atol=1e-6
        )
        assert found.labels.tolist() == [row.index(max(row)) for row in rows]
        between += sum(0.01 < weight < 0.99 for weight in want)
        labeller.update()
        here = sum(sure) / len(sure)
        spread = sum((c - here) ** 2 for c in sure) / (len(sure) - 1)
        mu = MOMENTUM * mu + (1 - MOMENTUM) * here
        variance = MOMENTUM * variance + (1 - MOMENTUM) * spread
        mean = [MOMENTUM * m + (1 - MOMENTUM) * sum(row[k] for row in rows) / len(rows) for k, m in enumerate(mean)]
    assert between > 20  # the weights do not only accept and refuse
    assert float(labeller.means.variance) == pytest.approx(variance, rel=1e-5)


def test_freematch_thresholds_are_the_global_one_times_the_classes_relative_probability() -> None:
    labeller = PseudoLabeller(PRIOR, PseudoLabelRule(thresholds="freematch", momentum=MOMENTUM))
    tau, local, histogram = 1 / CLASSES, [1 / CLASSES] * CLASSES, [1 / CLASSES] * CLASSES
    refused = 0
    for logits in trajectory():
        rows = probabilities(logits)
        labels = [row.index(max(row)) for row in rows]
        want = [float(max(row) >= tau * local[k] / max(local)) for row, k in zip(rows, labels, strict=True)]
        found = labeller.label(logits)
        assert found.accepted.tolist() == want
        refused += want.count(0.0)
        labeller.update()
        tau = MOMENTUM * tau + (1 - MOMENTUM) * sum(map(max, rows)) / len(rows)
        for k in range(CLASSES):
            local[k] = MOMENTUM * local[k] + (1 - MOMENTUM) * sum(row[k] for row in rows) / len(rows)
            histogram[k] = MOMENTUM * histogram[k] + (1 - MOMENTUM) * labels.count(k) / len(labels)
    assert refused > 20
    for name, value in (("confidence", tau), ("probability", local), ("predicted", histogram)):
        torch.testing.assert_close(
            getattr(labeller.means, name), torch.tensor(value, dtype=torch.float64), rtol=1e-5, atol=0
        )


def test_fairness_is_minus_the_cross_entropy_of_the_normalised_means() -> None:
    means = RunningMeans(CLASSES, torch.device("cpu"), MOMENTUM)
    means.probability = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    means.predicted = torch.tensor([0.5, 0.3, 0.2, 0.0], dtype=torch.float64)
    strong = trajectory(1)[0].double().requires_grad_()
    accepted = torch.tensor([1.0, 0.0] * 6, dtype=torch.float64)
    rows = [row for row, a in zip(probabilities(strong.detach()), accepted.tolist(), strict=True) if a]
    labels = [row.index(max(row)) for row in rows]
    mean = [sum(row[k] for row in rows) / len(rows) for k in range(CLASSES)]
    found = [m * len(labels) / labels.count(k) if labels.count(k) else 0.0 for k, m in enumerate(mean)]
    aim = [p / h if h else 0.0 for p, h in zip(means.probability.tolist(), means.predicted.tolist(), strict=True)]
    want = sum(a / sum(aim) * math.log(f / sum(found) + 1e-12) for a, f in zip(aim, found, strict=True))
    loss = fairness(strong, accepted, means)
    assert float(loss.detach()) == pytest.approx(want, rel=1e-9)
    (gradient,) = torch.autograd.grad(loss, strong)
    assert torch.isfinite(gradient).all()
    assert gradient[accepted == 0].abs().max() == 0
    assert float(fairness(strong.detach(), torch.zeros(12), means)) == 0.0


def test_the_first_steps_accept_everything_that_the_papers_accept() -> None:
    """Both start from a mean confidence of 1 / C, which no confidence is below."""
    for name in ("softmatch", "freematch"):
        rule = PseudoLabelRule(thresholds=name, momentum=0.999)  # type: ignore[arg-type]
        means = RunningMeans(CLASSES, torch.device("cpu"), rule.momentum)
        weights = RULES[name](means, rule, torch.tensor([0.25, 0.9]), torch.tensor([0, 3]))
        assert weights.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("name", ["softmatch", "freematch"])
def test_micro_batches_and_a_restore_change_nothing(name: str) -> None:
    rule = PseudoLabelRule(thresholds=name, momentum=MOMENTUM, alignment="uniform")  # type: ignore[arg-type]
    whole, cut = PseudoLabeller(PRIOR, rule), PseudoLabeller(PRIOR, rule)
    for step, logits in enumerate(trajectory(8)):
        whole.label(logits)
        for micro_batch in logits.chunk(4):
            cut.label(micro_batch)
        whole.update()
        cut.update()
        if step == 4:
            twin = PseudoLabeller(PRIOR, rule)
            twin.load_state_dict(whole.state_dict())
            whole = twin
    for mean in RunningMeans.NAMES:
        torch.testing.assert_close(getattr(whole.means, mean), getattr(cut.means, mean), rtol=1e-12, atol=1e-15)


def _rank(rank: int, world: int, store: str, out: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    labeller = PseudoLabeller(PRIOR, PseudoLabelRule(thresholds="softmatch", momentum=MOMENTUM))
    for logits in trajectory(6):
        labeller.label(logits.chunk(world)[rank])
        labeller.update()
    if rank == 1:
        torch.save(labeller.state_dict(), out)
    torch.distributed.destroy_process_group()


def _fair(rank: int, world: int, store: str, out: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    loss, gradient = _fairness_of(trajectory(1)[0].chunk(world)[rank], ACCEPTED.chunk(world)[rank])
    torch.save((loss, gradient), f"{out}{rank}")
    torch.distributed.destroy_process_group()


ACCEPTED = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0], dtype=torch.float64)


def _fairness_of(logits: torch.Tensor, accepted: torch.Tensor) -> tuple[float, torch.Tensor]:
    means = RunningMeans(CLASSES, torch.device("cpu"), MOMENTUM)
    means.probability = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    strong = logits.double().requires_grad_()
    loss = fairness(strong, accepted, means)
    return float(loss.detach()), torch.autograd.grad(loss, strong)[0]


def test_fairness_of_two_ranks_is_that_of_one_with_both_batches(tmp_path: object) -> None:
    """In value on each rank, and in the gradient after the engine's mean over the ranks."""
    run_ranks(_fair, 2, f"{tmp_path}/store", f"{tmp_path}/fair")
    loss, gradient = _fairness_of(trajectory(1)[0], ACCEPTED)
    found = [torch.load(f"{tmp_path}/fair{rank}") for rank in (0, 1)]
    assert [value for value, _ in found] == pytest.approx([loss, loss], rel=1e-12)
    torch.testing.assert_close(torch.cat([part for _, part in found]) / 2, gradient, rtol=1e-10, atol=1e-14)
    halves = [
        _fairness_of(half, kept)[0] for half, kept in zip(trajectory(1)[0].chunk(2), ACCEPTED.chunk(2), strict=True)
    ]
    assert abs(sum(halves) / 2 - loss) > 0.01  # a mean over ranks would be another loss


def test_the_means_do_not_depend_on_the_world_size(tmp_path: object) -> None:
    """Two ranks with half of each batch have the means of one process with all of it; the variance too."""
    run_ranks(_rank, 2, f"{tmp_path}/store", f"{tmp_path}/means")
    alone = PseudoLabeller(PRIOR, PseudoLabelRule(thresholds="softmatch", momentum=MOMENTUM))
    for logits in trajectory(6):
        alone.label(logits)
        alone.update()
    together = torch.load(f"{tmp_path}/means")
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(torch.tensor(together[name]), torch.tensor(value), rtol=1e-12, atol=1e-15)
