"""Images that truly have no label: in one dataset with labelled ones, or in a dataset of their own."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline.data import main
from pipeline.datasets.joint import read_manifests
from pipeline.datasets.manifest import read_manifest
from pipeline.datasets.splits import read_split
from pipeline.report.results import ROWS
from tests import warm
from tests.conftest import Stages
from tests.integration.test_evaluate import evaluate
from tests.relabel import relabelled


def rows_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_images_without_a_label_give_the_weights_that_hidden_labels_give(chain: Stages, tmp_path: Path) -> None:
    """Bit for bit, in stage 3; only what needs the hidden truth is absent."""
    digits = chain.digits
    train = read_manifest(digits / "train")
    split = read_split(digits / "split.json", train)
    hidden = np.concatenate([split.subset("unlabelled"), split.subset("unused")])
    labels = train.labels.copy()
    labels[hidden] = -1
    bare = relabelled(train, tmp_path / "train", labels)
    content = json.loads((digits / "split.json").read_text()) | {"manifest": bare.hash}
    del content["sha256"]
    (tmp_path / "split.json").write_text(json.dumps(content))
    parent = f"init_from={chain.runs / 'smoke' / 'distill' / 'export'}"
    # To the lineage this is another dataset, so the parent's labels count as foreign ones.
    data = [f"data.train={bare.folder}", f"data.split={tmp_path / 'split.json'}", "allow_more_labels=true"]
    run = chain.complete("semi", parent, *data, "run.experiment=bare")
    straight = chain.runs / "smoke" / "semi"
    for export in ("export", "export-student"):
        weights = (run / export / "model.safetensors").read_bytes()
        assert weights == (straight / export / "model.safetensors").read_bytes()
    rows, before = rows_of(run), rows_of(straight)
    assert max(row.get("ssl/mask_rate", 0) for row in rows) > 0  # unlabelled samples did count
    assert any("pseudo/coverage" in row for row in before)
    assert not any(key.startswith("pseudo/") for row in rows for key in row)
    there, here = (json.loads((folder / "evaluation.json").read_text()) for folder in (straight, run))
    assert here["labels"] == there["labels"] | {"hidden": 0, "without_label": len(split.subset("unlabelled"))}
    cards = [json.loads((folder / "export" / "model.json").read_text()) for folder in (straight, run)]
    assert cards[0]["class_groups"] == cards[1]["class_groups"]  # they count no hidden label
    for a, b in zip(there["models"].values(), here["models"].values(), strict=True):
        assert a["confusion"] == b["confusion"]


def test_several_datasets_without_labels_give_the_weights_that_hidden_labels_give(
    chain: Stages, tmp_path: Path
) -> None:
    """The labelled digits of two datasets, and the other digits with their labels hidden in a split, or without any."""
    train = read_manifest(chain.digits / "train")
    split = read_split(chain.digits / "split.json", train)
    codes = split.codes.tobytes().decode()
    known = np.isin(split.codes, [b"L", b"V"])
    parent = f"init_from={chain.runs / 'smoke' / 'distill' / 'export'}"
    weights = []
    for name, labels in (("hidden", train.labels), ("bare", np.where(known, train.labels, -1))):
        halves = [
            relabelled(train, tmp_path / name / str(k), labels, shards=shards)
            for k, shards in enumerate((slice(0, 2), slice(2, None)))
        ]
        joint = read_manifests([half.folder for half in halves])
        content = json.loads(split.content) | {"manifest": joint.hash, "codes": codes}
        content.pop("sha256", None)
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
        folders = ",".join(str(half.folder) for half in halves)
        data = [f"data.train=[{folders}]", f"data.split={tmp_path / f'{name}.json'}", "allow_more_labels=true"]
        run = chain.complete("semi", parent, *data, f"run.experiment=two-{name}")
        assert max(row.get("ssl/mask_rate", 0) for row in rows_of(run)) > 0
        weights.append((run / "export" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


@pytest.fixture(scope="module")
def few(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`labelled`: two shards of the digits. `pool`: two more, without labels and classes. `held`: a labelled one."""
    folder = tmp_path_factory.mktemp("few")
    train = read_manifest(digits / "train")
    relabelled(train, folder / "labelled", train.labels, shards=slice(0, 2))
    relabelled(train, folder / "pool", np.full(train.num_samples, -1), classes=[], shards=slice(2, 4))
    relabelled(train, folder / "held", train.labels, shards=slice(4, 5))
    return folder


def test_three_stages_read_two_datasets_without_a_split(stages: Stages, few: Path, digits: Path) -> None:
    """Stage 1 reads everything, stage 2 the labelled images, stage 3 both; validation is a dataset of its own."""
    labelled, pool = (read_manifest(few / name).num_samples for name in ("labelled", "pool"))
    data = [
        f"data.train=[{few / 'labelled'},{few / 'pool'}]",
        "data.split=null",
        f"data.validation={few / 'held'}",
        f"data.test={digits / 'test'}",
        "run.experiment=two-datasets",
    ]
    told = {}
    for stage in ("arm", "distill", "semi"):
        run = stages.complete(stage, *data)
        told[stage] = (run / "log.txt").read_text()
        words = f"labels: {labelled} for training, {read_manifest(few / 'held').num_samples} spent on validation"
        assert words in told[stage]
        assert f"0 hidden; {pool} unlabelled images have none" in told[stage]
        assert (run / "export" / "model.safetensors").is_file()
    assert f"an epoch is {labelled + pool} samples" in told["arm"]
    assert f"an epoch is {labelled} samples" in told["distill"]
    assert f"an epoch is {pool} samples" in told["semi"]
    evaluation = json.loads((stages.runs / "two-datasets" / "semi" / "evaluation.json").read_text())
    assert evaluation["labels"]["without_label"] == pool
    assert evaluation["protocol"] == f"{labelled} images with a label, {pool} without one"
    assert any("val/top1" in row for row in rows_of(stages.runs / "two-datasets" / "semi"))
    card = json.loads((stages.runs / "two-datasets" / "semi" / "export" / "model.json").read_text())
    assert [seen["count"] for seen in card["labels_seen"]] == [labelled]
    from pipeline.report.experiment import run as write_report

    page = write_report([stages.runs / "two-datasets"], None).read_text()
    assert words.capitalize() in page
    assert "recision and coverage of the pseudo-labels are absent" in page
    again = stages.run("semi", *data)
    assert again.returncode == 0
    assert "complete already" in again.stdout
    other = stages.run("semi", f"data.train=[{few / 'pool'},{few / 'labelled'}]", *data[1:])
    assert other.returncode == 3
    assert "another data.train" in other.stderr


def test_stage_1_needs_no_label_and_no_class(stages: Stages, few: Path) -> None:
    data = [f"data.train={few / 'pool'}", "data.split=null", "data.test=null", "run.experiment=none"]
    run = stages.complete("arm", *data)
    assert json.loads((run / "export" / "model.json").read_text())["classes"] == []
    refused = stages.run("distill", "init_from=null", *data)
    assert refused.returncode == 2
    assert "there are no labelled samples in" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize(
    ("overrides", "code", "sentence"),
    [
        (["data.train=[{few}/labelled,{few}/labelled]"], 2, "a folder is listed twice"),
        (["data.train=[]"], 2, "name at least one folder"),
        (["data.train=[{few}/labelled,{few}/nowhere]"], 3, "manifest.json does not exist"),
        (["data.train={few}/labelled"], 2, "there are no unlabelled samples in"),
        (["data.validation={few}/labelled"], 2, "is among the training data"),
        (["data.validation={few}/pool"], 3, "data.validation = {few}/pool has no sample with a label"),
        (["data.test={few}/pool"], 3, "data.test = {few}/pool has no sample with a label"),
    ],
)
def test_impossible_data_is_refused_in_a_sentence(
    chain: Stages, few: Path, overrides: list[str], code: int, sentence: str
) -> None:
    parent = f"init_from={chain.runs / 'smoke' / 'distill' / 'export'}"
    given = [parent, f"data.train=[{few}/labelled,{few}/pool]", "data.split=null", "data.test=null"]
    refused = chain.run("semi", *given, "run.experiment=refused", *(text.format(few=few) for text in overrides))
    assert refused.returncode == code, refused.stderr
    assert sentence.format(few=few) in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_test_set_may_lack_a_class_and_have_another_order(chain: Stages, few: Path, tmp_path: Path) -> None:
    """The numbers are those of the same images with the classes in the order of the training data."""
    held = read_manifest(few / "held")
    names = [name for name in reversed(held.classes) if name != held.classes[0]]
    numbers = {held.classes.index(name): number for number, name in enumerate(names)}
    labels = np.array([numbers.get(label, -1) for label in held.labels.tolist()])
    fewer = relabelled(held, tmp_path / "fewer", labels, classes=names)
    export = chain.runs / "smoke" / "semi" / "export"
    found = {}
    for data in (few / "held", fewer.folder):
        done = evaluate(export, data, "--out", tmp_path / "out")
        assert done.returncode == 0, done.stderr
        found[data] = json.loads((tmp_path / "out" / "evaluation.json").read_text())["models"]["teacher"]
    whole, part = found.values()
    known = held.classes[1:]
    assert {name: whole["per_class"][name] for name in known} == {name: part["per_class"][name] for name in known}
    assert part["per_class"][held.classes[0]] is None
    assert part["samples"] == int((labels >= 0).sum())
    overrides = ["init_from=null", f"data.test={fewer.folder}", "run.experiment=fewer"]
    run = chain.complete("distill", *overrides)
    assert json.loads((run / "evaluation.json").read_text())["models"]["student"]["samples"] == part["samples"]


def test_folds_estimate_what_all_labels_train_and_the_report_says_so(
    stages: Stages, digits: Path, tmp_path: Path
) -> None:
    """Stage 1 runs once; stages 2 and 3 run once for all labels and once in each fold."""
    split = tmp_path / "split.json"
    made = ["split", str(digits / "train"), "--out", str(split), "--labelled", "0.02", "--folds", "2"]
    assert main(made) == 0
    data = [f"data.train={digits / 'train'}", f"data.split={split}", "data.test=null", "run.experiment=cross"]
    values = [f"run.root={stages.runs}", *data, "loop.steps=4", "loop.save_every=4"]
    python = [sys.executable, "-m"]
    done = warm.run([*python, "studies.folds", "smoke", "--folds", "2", *values])
    assert done.returncode == 0, done.stderr
    found = json.loads((stages.runs / "cross" / "folds.json").read_text())
    labelled = len(read_split(split, read_manifest(digits / "train")).subset("labelled"))
    assert {row: values["images"] for row, values in found["rows"].items()} == dict.fromkeys(ROWS, labelled)
    assert {row: len(values["folds"]) for row, values in found["rows"].items()} == dict.fromkeys(ROWS, 2)
    assert not (stages.runs / "cross-fold1of2" / "arm").exists()
    done = warm.run([*python, "launchers", "local", "chain", "smoke", *values])
    assert done.returncode == 0, done.stderr
    page = (stages.runs / "cross" / "report.html").read_text()
    assert f"each of {labelled} labelled images is evaluated once" in page
