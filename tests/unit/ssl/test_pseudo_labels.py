"""Pseudo-labels and their long-tail remedies, by hand; mixups keep what they mix."""

import pytest
import torch

from pipeline.models.losses import soft_cross_entropy
from pipeline.ssl.acceptance import THRESHOLDS
from pipeline.ssl.config import PseudoLabelRule
from pipeline.ssl.pseudo_labels import PseudoLabeller
from pipeline.ssl.running_means import HORIZON
from pipeline.streaming.mixup import mix, mix_at_random, mix_by_confidence, pair_ratio

PRIOR = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
LOGITS = torch.log(torch.tensor([[0.7, 0.2, 0.1], [0.4, 0.35, 0.25]]))


def test_hard_labels_are_accepted_from_the_threshold_on() -> None:
    pseudo = PseudoLabeller(PRIOR, PseudoLabelRule(threshold=0.5)).label(LOGITS)
    assert pseudo.labels.tolist() == [0, 0]
    torch.testing.assert_close(pseudo.confidence, torch.tensor([0.7, 0.4]))
    assert pseudo.accepted.tolist() == [1.0, 0.0]
    assert pseudo.targets.tolist() == [[1, 0, 0], [1, 0, 0]]


def test_soft_labels_are_the_predictions_at_a_temperature() -> None:
    pseudo = PseudoLabeller(PRIOR, PseudoLabelRule(kind="soft", temperature=0.5)).label(LOGITS)
    squares = LOGITS.exp() ** 2
    torch.testing.assert_close(pseudo.targets, squares / squares.sum(1, keepdim=True))


def test_alignment_moves_the_mean_prediction_to_its_aim() -> None:
    torch.manual_seed(0)
    logits = torch.randn(4000, 3) + torch.tensor([2.0, 0.0, -1.0])
    for alignment, aim in (("labelled", PRIOR), ("uniform", torch.full((3,), 1 / 3, dtype=torch.float64))):
        labeller = PseudoLabeller(PRIOR, PseudoLabelRule(kind="soft", alignment=alignment))
        plain = torch.softmax(logits, 1).mean(0).double()
        labeller.label(logits)
        labeller.update()
        aligned = labeller.label(logits).targets.mean(0).double()
        assert (aligned - aim).abs().sum() < 0.5 * (plain - aim).abs().sum()


def test_balanced_thresholds_are_lower_for_rarer_classes_and_never_above_the_given_one() -> None:
    labeller = PseudoLabeller(PRIOR, PseudoLabelRule(threshold=0.8, thresholds="class_balanced"))
    confident = torch.log(torch.tensor([[0.9, 0.05, 0.05]] * 4 + [[0.05, 0.9, 0.05]] * 2 + [[0.05, 0.05, 0.9]]))
    labeller.label(confident)
    labeller.update()
    # Shares of the most frequent: 1, 1/2, 1/4; b / (2 - b): 1, 1/3, 1/7.
    found = THRESHOLDS["class_balanced"](labeller.means, labeller.rule)
    torch.testing.assert_close(found, 0.8 * torch.tensor([1, 1 / 3, 1 / 7], dtype=torch.float64))


def test_micro_batches_and_a_restore_give_the_same_labels() -> None:
    torch.manual_seed(0)
    rule = PseudoLabelRule(threshold=0.5, thresholds="class_balanced", alignment="uniform")
    whole, cut = PseudoLabeller(PRIOR, rule), PseudoLabeller(PRIOR, rule)
    for _ in range(5):
        logits = 2 * torch.randn(8, 3)
        whole.label(logits)
        for micro_batch in logits.chunk(4):
            cut.label(micro_batch)
        whole.label(logits, watch=False)
        whole.update()
        cut.update()
    torch.testing.assert_close(whole.means.probability, cut.means.probability, rtol=1e-12, atol=0)
    torch.testing.assert_close(whole.means.confident, cut.means.confident, rtol=1e-12, atol=0)
    twin = PseudoLabeller(PRIOR, rule)
    twin.load_state_dict(whole.state_dict())
    assert torch.equal(twin.label(logits).targets, whole.label(logits).targets)
    twin.update()
    whole.update()
    assert torch.equal(twin.means.probability, whole.means.probability)


def test_running_means_weigh_the_first_steps_alike_and_then_forget() -> None:
    """Against literal means over the steps that count; a step without a confident prediction does not count for the second."""
    torch.manual_seed(0)
    labeller = PseudoLabeller(PRIOR, PseudoLabelRule(threshold=0.6))
    predicted: list[torch.Tensor] = []
    confident: list[torch.Tensor] = []
    for step in range(HORIZON + 20):
        logits = torch.randn(4, 3) * (0.1 if step < 3 else 2.0)  # no prediction is confident at first
        probabilities = torch.softmax(logits, 1)
        predicted.append(probabilities.double().mean(0))
        sure = probabilities[probabilities.max(1).values >= 0.6].argmax(1)
        if len(sure):
            confident.append(torch.bincount(sure, minlength=3).double() / len(sure))
        labeller.label(logits)
        labeller.update()
        if step == HORIZON // 2:  # a checkpoint knows how far they are
            twin = PseudoLabeller(PRIOR, labeller.rule)
            twin.load_state_dict(labeller.state_dict())
            labeller = twin
        for mean, shares in ((labeller.means.probability, predicted), (labeller.means.confident, confident)):
            want = torch.stack(shares[:HORIZON]).mean(0) if shares else torch.full((3,), 1 / 3, dtype=torch.float64)
            for share in shares[HORIZON:]:
                want = want + (share - want) / HORIZON
            torch.testing.assert_close(mean, want, rtol=1e-6, atol=0)
    assert len(predicted) - 3 >= len(confident) > HORIZON


def test_collapse_shows_in_the_entropy_of_the_mean_prediction() -> None:
    labeller = PseudoLabeller(PRIOR, PseudoLabelRule())
    assert float(labeller.class_entropy()) == pytest.approx(1.0)
    labeller.label(torch.tensor([[50.0, 0.0, 0.0]] * 4))
    labeller.update()
    assert float(labeller.class_entropy()) == pytest.approx(0.0, abs=1e-6)


def test_soft_cross_entropy_is_torchs() -> None:
    logits, labels = torch.randn(5, 4), torch.tensor([0, 3, 2, 1, 1])
    one_hot = torch.nn.functional.one_hot(labels, 4).float()
    want = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.2, reduction="none")
    torch.testing.assert_close(soft_cross_entropy(logits, one_hot, 0.2), want)


class TestMixing:
    def pictures(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        torch.manual_seed(0)
        images = torch.arange(4.0)[:, None, None, None].expand(4, 3, 8, 8).clone()
        return images, torch.eye(4), torch.tensor([1, 0, 3, 2])

    @pytest.mark.parametrize("cut", [False, True])
    def test_pixels_and_targets_have_the_same_shares(self, cut: bool) -> None:
        images, targets, partner = self.pictures()
        ratio = torch.tensor([0.3, 0.5, 0.9, 1.0])
        mixed, blended, kept = mix(images, targets, partner, ratio, torch.full((4,), cut))
        for i in range(4):
            own = kept[i] * i + (1 - kept[i]) * partner[i]
            assert float(mixed[i].mean()) == pytest.approx(float(own), abs=1e-5)
            assert blended[i, i] == kept[i]
            assert blended[i, partner[i]] == pytest.approx(1 - float(kept[i]))
        assert set(mixed[0].unique().tolist()) <= ({0.0, 1.0} if cut else set(mixed[0].unique().tolist()))
        assert kept[3] == 1.0

    def test_the_more_confident_image_has_the_larger_share(self) -> None:
        images, targets, partner = self.pictures()
        confidence = torch.tensor([0.9, 0.3, 0.5, 0.5])
        torch.testing.assert_close(pair_ratio(confidence, partner), torch.tensor([0.75, 0.25, 0.5, 0.5]))
        _, blended = mix_by_confidence(images, targets, confidence, partner, cut_share=0.0)
        torch.testing.assert_close(blended.diagonal(), torch.tensor([0.75, 0.25, 0.5, 0.5]))

    def test_switched_off_it_changes_nothing(self) -> None:
        images, targets, partner = self.pictures()
        same = mix_at_random(images, targets, partner, mixup=0.0, cutmix=0.0)
        assert same[0] is images
        for mixup, cutmix in ((0.8, 0.0), (0.0, 1.0), (0.8, 1.0)):
            _, blended = mix_at_random(images, targets, partner, mixup=mixup, cutmix=cutmix)
            torch.testing.assert_close(blended.sum(1), torch.ones(4))
