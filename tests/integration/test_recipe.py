"""A recipe is written for a dataset that lies where README puts it, trains, and is kept when it was edited."""

import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from pipeline.config import load_config
from stages import SPECS
from tests import warm

SHORT = ("loop.steps=2", "optim.warmup_steps=1", "loop.eval_every=1", "data.loader.workers=0")
STAGES = ("distill", "semi")  # few images on a CPU: no pretraining


@pytest.fixture(scope="module")
def place(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a person's own, with the digits as data/mine."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "data").mkdir()
    (folder / "data" / "mine").symlink_to(digits)
    return folder


def launch(place: Path, *words: str) -> tuple[int, str, str]:
    """Run a command of the launchers in the person's folder: its exit code, output and errors."""
    code_of_ours = warm.ENVIRONMENT | {"PYTHONPATH": str(warm.ROOT)}  # the ranks are started in that folder too
    done = warm.run([sys.executable, "-m", "launchers", *words], code_of_ours, cwd=place)
    return done.returncode, done.stdout, done.stderr


def test_a_chain_without_configs_looks_writes_trains_and_reports(place: Path) -> None:
    code, said, errors = launch(place, "local", "chain", "mine", *SHORT, "--budget", "65s")
    assert code == 0, errors
    assert "1397 images of about 8 x 8 px, drawn or scanned, grey; 51 labels of 10 classes" in said
    assert "flips are harmful" in said
    assert "report: runs/mine/report.html" in said
    assert not (place / "configs/arm").exists()
    for stage in STAGES:
        spec = SPECS[stage]
        config = load_config(spec.config, place / "configs" / stage / "mine.yaml")
        assert config.loop.steps >= 100
        text = (place / "configs" / stage / "mine.yaml").read_text()
        assert "as timed here" in text
        assert f"make stage-{spec.number} CONFIG=configs/{stage}/mine.yaml" in text
    semi = yaml.safe_load((place / "configs/semi/mine.yaml").read_text())
    assert semi["weak"]["horizontal_flip"] == 0.0
    assert semi["weak"]["affine"]["rotation"] < semi["strong"]["affine"]["rotation"]
    assert semi["loop"]["select"] == "best"


def test_a_rerun_keeps_the_configs_and_again_keeps_what_was_edited(place: Path) -> None:
    files = {stage: place / "configs" / stage / "mine.yaml" for stage in STAGES}
    if not files["semi"].is_file():
        assert launch(place, "recipe", "mine", "--budget", "65s")[0] == 0
    before = {stage: path.read_text() for stage, path in files.items()}
    code, said, _ = launch(place, "recipe", "mine", "--budget", "2h")
    assert code == 0
    assert "kept: configs/distill/mine.yaml" in said
    assert {stage: path.read_text() for stage, path in files.items()} == before
    files["distill"].write_text(before["distill"] + "label_smoothing: 0.2\n")
    code, said, _ = launch(place, "recipe", "mine", "--budget", "0.3T", "--flips", "yes", "--again")
    assert code == 0
    assert "configs/distill/mine.yaml was edited: it is kept as configs/distill/mine.yaml.1" in said
    assert (place / "configs/distill/mine.yaml.1").read_text().endswith("label_smoothing: 0.2\n")
    assert not (place / "configs/semi/mine.yaml.1").exists()
    assert yaml.safe_load(files["distill"].read_text())["augment"]["horizontal_flip"] == 0.5


def test_counted_work_gives_the_steps_that_its_sum_allows(place: Path) -> None:
    data = ("--train", "data/mine/train", "--split", "data/mine/split.json")
    assert launch(place, "recipe", "counted", *data, "--budget", "1T")[0] == 0
    texts = [(place / "configs" / stage / "counted.yaml").read_text() for stage in STAGES]
    assert all("* 10^12 FLOPs" in text for text in texts)
    # The small ResNet at 32 px: 14.1 million FLOPs an image forward. Batches are of 16, with three guessed or four unlabelled
    # images for each.
    distill, semi = (yaml.safe_load(text)["loop"]["steps"] for text in texts)
    forward = 14.1e6
    assert distill * 16 * 4 * 3 * forward + semi * 16 * (5 * 3 + 4) * forward == pytest.approx(1e12, rel=0.1)
    code, said, _ = launch(place, "recipe", "counted", *data, "--budget", "0.2T", "--again")
    assert code == 0
    assert "the least of every stage takes 0.7 * 10^12 FLOPs, more than the budget 0.2T" in said


def test_a_budget_for_few_steps_takes_the_smaller_view(place: Path) -> None:
    rng = np.random.default_rng(0)
    for k in range(60):
        folder = place / "pictures" / f"class-{k % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(folder / f"{k}.png")
    convert = [sys.executable, "-m", "pipeline.data", "convert", "imagefolder", "pictures", "--out", "data/pictures"]
    done = warm.run(convert, warm.ENVIRONMENT | {"PYTHONPATH": str(warm.ROOT)}, cwd=place)
    assert done.returncode == 0, done.stderr
    found = {}
    for budget in ("0.4T", "20T"):
        code, _, errors = launch(place, "recipe", "pictures", "--train", "data/pictures", "--budget", budget, "--again")
        assert code == 0, errors
        text = (place / "configs/distill/pictures.yaml").read_text()
        found[budget] = yaml.safe_load(text)["model"]["image_size"]
        assert ("the budget pays for few steps at 64 px" in " ".join(text.split())) == (budget == "0.4T")
    assert found == {"0.4T": 32, "20T": 64}


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("recipe", "nowhere"), 2, "there is no dataset at data/nowhere/train; give its folders with --train"),
        (("recipe", "other", "--train", "data/nowhere"), 3, "data/nowhere"),
        (("recipe", "other", "--train", "data/mine/train", "--budget", "soon"), 2, "give a number and s, m or h"),
        (("recipe", "../x", "--train", "data/mine/train"), 2, "must begin with a letter or a digit"),
    ],
)
def test_what_cannot_be_written_is_refused_in_a_sentence(
    place: Path, words: tuple[str, ...], code: int, said: str
) -> None:
    found, _, errors = launch(place, *words)
    assert found == code, errors
    assert said in errors
    assert "Traceback" not in errors
