"""The report and TensorBoard as a person sees them: read from the files, and opened in a browser if there is one."""

import csv
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.data import main as data
from pipeline.datasets.manifest import read_manifest
from pipeline.datasets.splits import read_split
from pipeline.errors import ConfigError, DataError
from pipeline.evaluate.predictions import Predictions
from pipeline.jsonl import read_rows
from pipeline.report import experiment as report
from pipeline.report.ablation import NotPaired, ablation_table, designs_of
from pipeline.report.results import read_result
from tests.conftest import ENVIRONMENT, ROOT, Stages

BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --enable-logging=stderr --hide-scrollbars"
).split()
browser = pytest.mark.skipif(BROWSER is None, reason="no chromium here: apt-get install chromium")


SECTIONS = (
    "Was it worth it?",
    "Baselines on the same labels",
    "Images worth labelling first",
    "Accuracy",
    "Where the models look",
    "Grad-CAM",
    "Effective receptive fields",
    "Stage 1: ARM",
    "Stage 3: semi",
    "Time and throughput",
    "No incidents",
    "Lineage",
    "labels seen",
    "data:image/png;base64,",
)
HISTOGRAMS = {
    "arm": set(),
    "distill": {"val/confidence"},
    "semi": {"val/confidence", "val/teacher_confidence", "pseudo/classes"},
}
# TensorBoard's palette in the order of the runs: arm/tb, arm/tb/by_samples, distill/tb, ..., semi/tb, ...
RUN_COLOURS = {"arm": (0xFF, 0x70, 0x43), "distill": (0xCC, 0x33, 0x11), "semi": (0xEE, 0x33, 0x77)}


@pytest.fixture(scope="module")
def page(chain: Stages, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report.run([chain.runs / "smoke"], tmp_path_factory.mktemp("report") / "smoke" / "report.html")


def test_the_page_needs_nothing_else_and_holds_every_section(page: Path) -> None:
    text = page.read_text()
    for word in SECTIONS:
        assert word in text, word
    assert not re.findall(r'(?:src|href)="(?!data:|#)', text)
    assert "@import" not in text
    assert "url(http" not in text
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))


def test_every_figure_is_there_for_print_and_every_table_in_three_forms(page: Path) -> None:
    beside = page.with_suffix("")
    drawn = {f.stem for f in (beside / "figures").glob("*.svg")}
    assert {
        "groups",
        "classes",
        "reliability",
        "confusion",
        "gradcam",
        "receptive_field",
        "semi_energy",
        "arm_loss",
    } <= drawn
    assert {f.stem for f in (beside / "figures").glob("*.pdf")} == drawn
    assert set(re.findall(r'<figure[^>]* id="(\w+)"', page.read_text())) == drawn
    tables = {f.stem for f in (beside / "tables").glob("*.csv")}
    assert {"accuracy", "per_class", "confusions", "speed"} <= tables
    assert {f.stem for f in (beside / "tables").glob("*.tex")} == tables
    assert "## Accuracy" in (beside / "report.md").read_text()


def test_the_page_shows_the_numbers_of_the_run(chain: Stages, page: Path) -> None:
    models = json.loads((chain.runs / "smoke" / "semi" / "evaluation.json").read_text())["models"]
    rows = list(csv.DictReader((page.with_suffix("") / "tables" / "accuracy.csv").read_text().splitlines()))
    last = next(r for r in rows if r[""] == "stage 3, teacher")
    low, high = models["teacher"]["intervals"]["top1"]
    assert last["top1"] == f"{models['teacher']['top1']:.2f} [{low:.1f}, {high:.1f}]"
    assert last["ece"] == f"{models['teacher']['ece']:.2f}"


def test_the_page_compares_the_stages_with_baselines_that_are_fitted_on_the_spot(chain: Stages, page: Path) -> None:
    """The row of logistic regression is what scikit-learn reaches on the split's labels; gains are of the same images."""
    tables = page.with_suffix("") / "tables"
    rows = {r[""]: r for r in csv.DictReader((tables / "baselines.csv").read_text().splitlines())}
    assert set(rows) == {
        f"{learner} on {source}"
        for learner in ("logistic regression", "1-nearest neighbour", "RBF-SVM", "label spreading")
        for source in ("pixels", "stage 1's features")
    }
    assert float(rows["logistic regression on pixels"]["top1"]) > 60
    assert "validation images" in rows["logistic regression on pixels"]["setting"]
    gains = {r[""]: r for r in csv.DictReader((tables / "gains.csv").read_text().splitlines())}
    models = {stage: json.loads((chain.runs / "smoke" / stage / "evaluation.json").read_text())["models"]
              for stage in ("distill", "semi")}  # fmt: skip
    gained = models["semi"]["teacher"]["top1"] - models["distill"]["student"]["top1"]
    assert float(gains["stage 3, teacher, over stage 2"]["points of top-1"]) == pytest.approx(gained, abs=0.051)
    best = max(float(r["top1"]) for r in rows.values())
    name = next(n for n in gains if n.startswith("exported model over"))
    assert float(gains[name]["points of top-1"]) == pytest.approx(models["semi"]["teacher"]["top1"] - best, abs=0.06)


def test_a_round_of_labelling_gives_a_dataset_and_a_split_with_the_new_labels(
    chain: Stages, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    smoke, out = chain.runs / "smoke", tmp_path / "next"
    assert data(["label-next", str(smoke), "--number", "12", "--out", str(out)]) == 0
    table = out / "label-next.csv"
    rows = list(csv.DictReader(table.read_text().splitlines()))
    config = yaml.safe_load((smoke / "semi" / "config.yaml").read_text())["data"]
    before = read_manifest(Path(config["train"]))
    split = read_split(Path(config["split"]), before)
    chosen = [int(row["sample_index"]) for row in rows]
    assert len(set(chosen)) == 12
    assert set(chosen) <= set(split.subset("unlabelled").tolist())
    unsure = [float(row["uncertainty"]) for row in rows]
    assert unsure[0] == max(unsure)
    with Image.open(out / "label-next.png") as sheet:
        assert sheet.size == (4 * 128, 3 * 168)
    truth = [before.classes[before.labels[k]] for k in chosen[:5]]
    for row, name in zip(rows, truth, strict=False):
        row["label"] = name
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    answers = ["label-next", str(smoke), "--labels", str(table), "--to", str(tmp_path / "mine-2")]
    assert data(answers) == 0
    told = capsys.readouterr().out
    assert "5 labels added" in told
    assert "make chain NAME=smoke ARGS=" in told
    after = read_manifest(tmp_path / "mine-2")
    new = read_split(tmp_path / "mine-2" / "split.json", after)
    assert set(new.subset("labelled")) == set(split.subset("labelled")) | set(chosen[:5])
    assert (new.subset("validation") == split.subset("validation")).all()
    assert data(["verify", str(tmp_path / "mine-2")]) == 0
    assert data(answers) == ConfigError.exit_code
    rows[0]["label"] = "no such class"
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    assert data([*answers[:-1], str(tmp_path / "mine-3")]) == ConfigError.exit_code
    assert "line 2 'no such class'; known: " in capsys.readouterr().err
    assert not (tmp_path / "mine-3").exists()


def test_designs_are_named_by_what_differs_and_compared_in_pairs(chain: Stages, tmp_path: Path) -> None:
    """The other design differs in one key; its predictions are those of the first, but right on one tail class."""
    other = tmp_path / "other"
    shutil.copytree(chain.runs / "smoke", other, ignore=shutil.ignore_patterns("checkpoints", "tb"))
    config = other / "semi" / "config.yaml"
    config.write_text(re.sub(r"(?m)^label_smoothing: .*$", "label_smoothing: 0.07", config.read_text()))
    path = other / "semi" / "predictions-teacher.npz"
    predictions = Predictions.load(path, 10)
    gained = (predictions.labels == 9) & (predictions.predicted != 9)
    assert gained.sum() > 0
    improved = np.where(predictions.labels == 9, 9, predictions.predicted)
    Predictions(**{**vars(predictions), "predicted": improved}).save(path)
    page = report.run([chain.runs / "smoke", other], tmp_path / "both.html")
    rows = list(csv.DictReader((page.with_suffix("") / "tables" / "ablation.csv").read_text().splitlines()))
    assert [r["different keys"].partition("=")[0] for r in rows] == ["semi.label_smoothing"] * 2
    assert rows[1]["different keys"] == "semi.label_smoothing=0.07"
    assert rows[1]["Δ top1 [95 %], p"].startswith(f"{100 * gained.sum() / 400:+.2f} [")
    assert rows[1]["Δ top1 [95 %], p"].endswith("< 0.001")


def test_designs_are_paired_by_seed_and_only_on_the_same_images(chain: Stages, tmp_path: Path) -> None:
    """Two designs have equal predictions for each of two seeds; a third design was evaluated on other images."""
    smoke = chain.runs / "smoke"
    predictions = {s: Predictions.load(smoke / "semi" / "predictions-teacher.npz", 10) for s in (0, 1)}
    predictions[1] = Predictions(**{**vars(predictions[1]), "predicted": (predictions[1].predicted + 1) % 10})

    def experiment(name: str, seed: int, smoothing: float, moved: int = 0) -> Path:
        shutil.copytree(smoke, tmp_path / name, ignore=shutil.ignore_patterns("checkpoints", "tb"))
        config = tmp_path / name / "semi" / "config.yaml"
        text = re.sub(r"(?m)^label_smoothing: .*$", f"label_smoothing: {smoothing}", config.read_text())
        config.write_text(re.sub(r"(?m)^  seed: .*$", f"  seed: {seed}", text))
        own = predictions[seed]
        own = Predictions(**{**vars(own), "sample_indices": own.sample_indices + moved})
        own.save(tmp_path / name / "semi" / "predictions-teacher.npz")
        return tmp_path / name

    first = [experiment("a0", 0, 0.1), experiment("a1", 1, 0.1)]
    second = [experiment("b1", 1, 0.2), experiment("b0", 0, 0.2)]
    results = [read_result(folder) for folder in [*first, *second, experiment("c0", 0, 0.3, moved=1)]]
    table = ablation_table(designs_of(results), report.compare)
    assert [row[-2] for row in table.rows] == ["first", "+0.00 [+0.00, +0.00], 1.000", "–"]
    assert "semi.label_smoothing=0.3: no paired gain: evaluated on other images" in table.note
    with pytest.raises(NotPaired, match=r"no seed has predictions .* \(first: 0; this one: 1\)"):
        report.compare(results[:1], results[1:2], "stage 3, teacher")


def test_a_folder_that_is_not_an_experiment_is_refused_by_naming_the_experiments_beside_it(
    chain: Stages, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"experiments beside it: .*smoke"):
        report.run([chain.runs / "smok"], None)
    with pytest.raises(ConfigError, match=r"ends in \.html"):
        report.run([chain.runs / "smoke"], tmp_path / "report.pdf")


@pytest.mark.parametrize("stage", ["arm", "distill", "semi"])
def test_tensorboard_holds_the_log_row_for_row_and_pictures(chain: Stages, stage: str) -> None:
    run = chain.runs / "smoke" / stage
    events = EventAccumulator(str(run / "tb"), size_guidance={"scalars": 0}).Reload()
    rows = read_rows(run / "metrics.jsonl")
    for name in {name for row in rows for name in row if "/" in name}:
        logged = [(row["step"], row[name]) for row in rows if name in row]
        shown = [(e.step, e.value) for e in events.Scalars(name)]
        assert [step for step, _ in shown] == [step for step, _ in logged], name
        assert [v for _, v in shown] == pytest.approx([v for _, v in logged], rel=1e-6, abs=1e-9), name
    images = events.Tags()["images"]
    expected = {"arm": "input, means alone, prediction", "distill": "attribution", "semi": "views/unlabelled"}
    assert expected[stage] in images
    assert set(events.Tags()["histograms"]) == HISTOGRAMS[stage]
    if stage == "semi":
        unlabelled = read_split(chain.digits / "split.json", read_manifest(chain.digits / "train")).subset("unlabelled")
        for event in events.Histograms("pseudo/classes"):
            (coverage,) = (r["pseudo/coverage"] for r in rows if r["step"] == event.step and "pseudo/coverage" in r)
            assert event.histogram_value.num == round(coverage / 100 * len(unlabelled))
    assert "custom_scalars__config__" in events.Tags()["tensors"]
    assert "_hparams_/session_start_info" in events.summary_metadata


@browser
@pytest.mark.parametrize("width", [400, 1400])
def test_the_page_opens_without_a_console_error_and_shows_every_figure(page: Path, tmp_path: Path, width: int) -> None:
    offline = ["--host-resolver-rules=MAP * ~NOTFOUND", f"--window-size={width},1200"]
    dom, said = browse(page.as_uri(), tmp_path, *offline, "--dump-dom")
    assert "CONSOLE" not in said, said
    figures = len(list((page.with_suffix("") / "figures").glob("*.svg")))
    assert len(re.findall(r"<figure[^>]* id=", dom)) == figures
    assert dom.count("<svg") == figures


@pytest.fixture(scope="module")
def board(chain: Stages) -> Iterator[str]:
    """Run TensorBoard on the runs of the chain."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(chain.runs / "smoke"), "--port", str(port)]
    server = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                with urllib.request.urlopen(f"{url}/data/plugin/scalars/tags", timeout=10) as response:
                    if "semi/tb" in json.load(response):
                        break
            except OSError:
                pass
            assert server.poll() is None
            time.sleep(0.2)
        yield url
    finally:
        server.terminate()
        server.wait()


@browser
def test_the_scalars_page_shows_the_curves_of_all_three_stages(board: str, tmp_path: Path) -> None:
    """Shadow roots hide the document, so the screenshot must have lines in the runs' colours."""
    shot = tmp_path / "board.png"
    options = ["--window-size=1400,1600", "--virtual-time-budget=30000", f"--screenshot={shot}"]
    browse(f"{board}/#scalars&tagFilter=train%2Floss", tmp_path, *options)
    with Image.open(shot) as image:
        charts = np.array(image.convert("RGB"))[100:, 380:].reshape(-1, 3)  # right of the list of runs
    for stage, colour in RUN_COLOURS.items():
        drawn = int((charts == np.array(colour)).all(1).sum())
        assert drawn > 100, f"{stage}: {drawn} pixels"


def browse(url: str, folder: Path, *more: str) -> tuple[str, str]:
    """Return the page's document after its scripts have run, and the browser's messages."""
    assert BROWSER
    command = [BROWSER, *FLAGS, f"--user-data-dir={folder / 'profile'}", *more, url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr
