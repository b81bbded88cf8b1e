"""Verdicts on constructed cases: a gain that is, one that is not, a loss; and rules of advice that speak and that are silent."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from pipeline.evaluate.baselines import Baseline
from pipeline.evaluate.metrics import report
from pipeline.evaluate.predictions import Predictions
from pipeline.report.recommend import Candidate, recommend
from pipeline.report.results import read_result
from pipeline.report.verdict import Gain, Simple, Worth, advise
from pipeline.report.worth import compare, measure

CLASSES = 4
TITLES = {"logistic": "logistic regression", "neighbour": "1-nearest neighbour"}
LABELS = np.repeat(np.arange(CLASSES), 50)  # 200 test images


def predictions(right: int, *, also: int = 0, confidence: float = 0.9) -> Predictions:
    """Predict the first `right` images of each class, and `also` more of class 0, rightly, and the others wrongly."""
    nth = np.arange(len(LABELS)) % 50
    correct = (nth < right) | ((LABELS == 0) & (nth < right + also))
    return Predictions(
        sample_indices=np.arange(len(LABELS)),
        labels=LABELS,
        predicted=np.where(correct, LABELS, (LABELS + 1) % CLASSES),
        label_rank=np.where(correct, 0, 1),
        confidence=np.full(len(LABELS), confidence),
        loss=np.full(len(LABELS), 0.5),
    )


GROUPS = {"head": np.array([0, 1]), "tail": np.array([2, 3])}


def experiment(folder: Path, groups: dict[str, np.ndarray] = GROUPS, **models: Predictions) -> Path:
    """Write what stages 2 and 3 leave behind: `distill`, `student`, `teacher` -> predictions."""
    names = tuple("abcd")
    for stage, members in (("distill", {"student": "distill"}), ("semi", {"student": "student", "teacher": "teacher"})):
        (folder / stage).mkdir(parents=True)
        found = {model: models[key] for model, key in members.items() if key in models}
        for model, each in found.items():
            each.save(folder / stage / f"predictions-{model}.npz")
        values = {
            "dataset": "d", "split": "s", "protocol": "p", "labels": {"validation": 100},
            "labelled_per_class": {"a": 40, "b": 30, "c": 2, "d": 4},
            "models": {model: report(each, groups, names) for model, each in found.items()},
        }  # fmt: skip
        (folder / stage / "evaluation.json").write_text(json.dumps(values))
        (folder / stage / "config.yaml").write_text(yaml.safe_dump({"export": "teacher", "pseudo": {"threshold": 0.9}}))
    return folder


def logged(folder: Path, stage: str, rows: list[dict[str, float]]) -> None:
    (folder / stage / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def compared(*folders: Path, **baselines: Predictions) -> Worth:
    """Compare experiments with one another and with baselines on pixels, given by the first word of their titles."""
    fitted = {
        f"{TITLES[name]} on pixels": Baseline(name, each, True, "C 1", "10 images", 0.1)
        for name, each in baselines.items()
    }
    return compare([read_result(folder) for folder in folders], [fitted for _ in folders])


def third(found: Worth) -> Gain:
    return next(gain for gain in found.gains if gain.subject == "stage 3")


def test_a_gain_that_is_one_is_established(tmp_path: Path) -> None:
    folder = experiment(tmp_path / "e", distill=predictions(30), student=predictions(38), teacher=predictions(40))
    found = compared(folder, logistic=predictions(20))
    gain = third(found)
    assert (gain.value, gain.verdict) == (20.0, "established")
    assert gain.low > 10
    assert gain.sentence().startswith("stage 3 added 20.0 points (1")
    assert gain.sentence().endswith("): established")
    assert [g.verdict for g in found.gains] == ["established"] * 3
    assert found.gains[0].sentence().startswith("stage 2 is 20.0 points above logistic regression on pixels (")
    assert not [item for item in advise(read_result(folder), found, "runs/e") if item.name in ("stage-3", "baseline")]


def test_a_gain_that_chance_explains_is_not_established(tmp_path: Path) -> None:
    """Stage 3 is right on 7 other images than stage 2 and wrong on 5 that stage 2 had: one point of 200 images."""
    before = predictions(30)
    after = before.predicted.copy()
    after[30:37], after[50:55] = LABELS[30:37], (LABELS[50:55] + 1) % CLASSES
    folder = experiment(
        tmp_path / "e", distill=before, student=before, teacher=Predictions(**{**vars(before), "predicted": after})
    )
    found = compared(folder)
    gain = third(found)
    assert gain.value == pytest.approx(1.0)
    assert gain.low < 0 < gain.high
    assert gain.sentence() == f"stage 3 added 1.0 points ({gain.low:.1f} to {gain.high:.1f}): not established"
    advice = next(item for item in advise(read_result(folder), found, "runs/e") if item.name == "stage-3")
    assert "other seeds" in advice.text
    assert not advice.warning


def test_a_loss_is_called_one_and_the_advice_is_to_drop_the_stage(tmp_path: Path) -> None:
    folder = experiment(tmp_path / "e", distill=predictions(40), student=predictions(30), teacher=predictions(30))
    found = compared(folder)
    assert third(found).sentence().startswith("stage 3 cost 20.0 points (-2")
    assert third(found).verdict == "a loss"
    first = advise(read_result(folder), found, "runs/e")[0]
    assert (first.name, first.warning) == ("stage-3", True)
    assert "Drop stage 3: use runs/e/distill/export" in first.text


def test_a_model_below_a_baseline_is_a_warning(tmp_path: Path) -> None:
    folder = experiment(tmp_path / "e", distill=predictions(30), student=predictions(40), teacher=predictions(40))
    found = compared(folder, neighbour=predictions(20), logistic=predictions(45))
    assert [b.title for b in found.baselines] == ["logistic regression on pixels", "1-nearest neighbour on pixels"]
    last = found.gains[-1]
    assert last.sentence().startswith(
        "the exported model (stage 3, teacher) is 10.0 points below logistic regression on pixels"
    )
    advice = {item.name: item for item in advise(read_result(folder), found, "runs/e")}
    assert advice["baseline"].warning
    assert "is below logistic regression on pixels" in advice["baseline"].text


@pytest.mark.parametrize(("validated", "images", "recommended"), [
    ([70.0, 75.0, 60.0], 100, "stage 3"),  # 5 points above, one standard error is 6.3
    ([70.0, 77.0, 76.9], 100, "stage 2"),
    ([70.0, 75.0, 90.0], 10, "spreading"),
    ([70.0, 75.0, 80.0], 10, "stage 3"),
    ([100.0, 0.0, 100.0], 1, "stage 3"),
])  # fmt: skip
def test_the_export_is_recommended_unless_another_is_a_standard_error_above(
    validated: list[float], images: int, recommended: str
) -> None:
    candidates = [Candidate(name, v) for name, v in zip(("stage 3", "stage 2", "spreading"), validated, strict=True)]
    assert recommend(candidates, images).title == recommended


def test_a_simple_learner_that_validation_establishes_is_advised(tmp_path: Path) -> None:
    folder = experiment(tmp_path / "e", distill=predictions(30), student=predictions(40), teacher=predictions(40))
    logged(folder, "distill", [{"step": 1, "val/balanced": 50.0}, {"step": 2, "val/balanced": 55.0}])
    logged(
        folder,
        "semi",
        [{"step": n, "val/teacher_balanced": value, "val/teacher_top1": value} for n, value in ((1, 64.0), (2, 60.0))],
    )
    spreading = Simple("label spreading on pixels", 90.0, None, "", 1.0, 70.0)
    item = names(folder, Worth([], [spreading], []))["recommended"]
    assert item.warning
    assert (
        "On the 100 validation images label spreading on pixels reaches 70.0 %, the exported model 60.0 %" in item.text
    )
    assert "recommended" not in names(folder, Worth([], [spreading._replace(validated=66.0)], []))
    assert "recommended" not in names(folder, Worth([], [spreading._replace(validated=None)], []))
    values = yaml.safe_load((folder / "semi" / "config.yaml").read_text()) | {"loop": {"select": "best"}}
    (folder / "semi" / "config.yaml").write_text(yaml.safe_dump(values))
    assert "recommended" not in names(folder, Worth([], [spreading], []))  # 64 is a standard error of 70


def test_seeds_are_pooled_and_baselines_that_saw_fewer_images_are_paired_on_those(tmp_path: Path) -> None:
    whole = predictions(20)
    half = np.arange(len(LABELS)) % 2 == 0
    some = Predictions(**{name: value[half] for name, value in vars(whole).items()})
    folders = [experiment(tmp_path / name, distill=predictions(n)) for name, n in (("a", 30), ("b", 40))]
    found = compared(*folders, logistic=some)
    assert [gain.name for gain in found.gains] == ["exported model over logistic regression on pixels"]
    assert found.gains[0].value == pytest.approx((20 + 40) / 2)


def test_without_images_there_are_gains_but_no_baselines_and_the_reason_is_said(tmp_path: Path) -> None:
    folder = experiment(tmp_path / "e", distill=predictions(30), student=predictions(40), teacher=predictions(40))
    found = measure([read_result(folder)])
    assert third(found).verdict == "established"
    assert found.baselines == []
    assert "holds no config.yaml that names its data" in found.missing


EMPTY = Worth([], [], [])


def names(folder: Path, found: Worth = EMPTY) -> dict[str, Any]:
    return {item.name: item for item in advise(read_result(folder), found, "runs/e")}


def test_no_accepted_pseudo_label_is_a_warning_with_numbers(tmp_path: Path) -> None:
    folder = experiment(tmp_path / "e", distill=predictions(30), teacher=predictions(30))
    logged(folder, "semi", [{"step": k, "ssl/mask_rate": 0.0, "ssl/confidence": 0.41} for k in range(1, 9)])
    advice = names(folder)["mask-rate"]
    assert advice.warning
    assert "accepted 0.0 % of its pseudo-labels" in advice.text
    assert "the mean confidence was 0.41, and pseudo.threshold is 0.9. Lower pseudo.threshold" in advice.text
    logged(folder, "semi", [{"step": k, "ssl/mask_rate": 0.3, "ssl/confidence": 0.8} for k in range(1, 9)])
    assert "mask-rate" not in names(folder)


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ([20, 40, 55, 65, 75, 84, 88, 92, 97], "longer-distill"),
        ([20, 70, 90, 91, 91, 91, 91, 91, 91], None),
        ([20, 70, 92, 80, 75, 74, 73, 74, 73], "shorter-distill"),
        ([60, 66, 67, 66, 67, 65, 66, 66, 65], None),
        ([20, 90], None),
    ],
)
def test_the_length_of_training_is_advised_by_the_curve_of_validation(
    tmp_path: Path, values: list[float], name: str | None
) -> None:
    folder = experiment(tmp_path / "e", distill=predictions(30))
    logged(folder, "distill", [{"step": 10 * k, "val/balanced": v} for k, v in enumerate(values, 1)])
    assert [found for found in names(folder) if "distill" in found] == ([name] if name else [])


def test_labels_are_asked_for_the_weak_classes_with_few_labels_first(tmp_path: Path) -> None:
    each = predictions(45)
    predicted = each.predicted.copy()
    for c, lost in ((2, 30), (3, 40)):
        own = np.flatnonzero(c == LABELS)[:lost]
        predicted[own] = 0
    folder = experiment(tmp_path / "e", distill=Predictions(**{**vars(each), "predicted": predicted}))
    text = names(folder)["labels"].text
    assert text.startswith("Collect labels of c (30 %, 2 labels), d (10 %, 4 labels):")
    assert "label-next runs/e" in text
    assert "labels" not in names(experiment(tmp_path / "f", distill=predictions(45)))


def test_confidences_that_are_far_off_are_told(tmp_path: Path) -> None:
    folder = experiment(tmp_path / "e", distill=predictions(30, confidence=0.95))
    assert "are off by 35 points" in names(folder)["calibration"].text
    assert "calibration" not in names(experiment(tmp_path / "f", distill=predictions(45, confidence=0.92)))


def test_the_tables_of_a_verdict_have_one_row_each(tmp_path: Path) -> None:
    gains = [Gain("stage 3, teacher, over stage 2", "stage 3", "stage 2", 1.4, -0.9, 3.8)]
    found = Worth(
        gains, [Simple("logistic regression on pixels", 46.5, 4.2, "C 1; tuned on 20 images", 0.3)], ["Capped."]
    )
    assert gains[0].sentence() == "stage 3 added 1.4 points (-0.9 to 3.8): not established"
    tables = {table.name: table for table in found.tables()}
    assert tables["gains"].rows == [["stage 3, teacher, over stage 2", "+1.4", "-0.9 to +3.8", "not established"]]
    assert tables["baselines"].note == "Capped."
