"""The scoreboard adds cells up by hand-computed sums, says what is missing, and makes its pictures without chance."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.datasets.manifest import read_manifest
from pipeline.errors import ConfigError, DataError
from pipeline.evaluate.baselines import Samples, fit_baseline
from studies import glyphs
from studies.scoreboard import pictures
from studies.scoreboard.__main__ import main
from studies.scoreboard.board import Board, Place, write_document
from studies.scoreboard.columns import OURS, TITLES, _first_channel, simple
from studies.scoreboard.recipe import Chain

PLACES = [Place("digits", regime, seed) for seed in (0, 1) for regime in ("4", "10")]


def cell(accuracy: float, ece: float = 3.0, labels: int = 40) -> dict[str, float]:
    return {
        "balanced": accuracy,
        "ece": ece,
        "images": 1000,
        "seconds": 2.0,
        "labels": labels,
        "job_seconds": 9.0,
        "validated": accuracy,
        "validation": 100,
    }


def filled(folder: Path) -> Board:
    """Four labels: the chain beats the SVM by 5 and 7; ten labels: it loses to the ResNet by 2, with one seed alone."""
    board = Board(folder, PLACES)
    for place in (PLACES[0], PLACES[1], PLACES[2]):
        for column in TITLES:
            if column not in OURS:
                board.write(place, column, cell(10))
    for seed, (svm, chain) in enumerate(((80, 85), (81, 88))):
        place = Place("digits", "4", seed)
        board.write(place, "svm", cell(svm))
        board.write(place, "resnet", cell(60))
        board.write(place, "stage-2", cell(chain - 1))
        board.write(place, "stage-3-teacher", cell(chain))
        board.write(place, "chain", cell(chain, ece=9 + seed))
    place = Place("digits", "10", 0)
    board.write(place, "resnet", cell(92, labels=300))
    board.write(place, "stage-2", cell(91, labels=300))
    board.write(place, "stage-3-teacher", cell(90, labels=300))
    board.write(place, "chain", cell(90, ece=5, labels=300))
    return board


def test_the_json_line_is_the_sums_by_hand(tmp_path: Path) -> None:
    board = Board(filled(tmp_path).folder, PLACES)  # read again from the files
    found = board.summary()
    assert board.best_baseline(("digits", "4")) == ("svm", 6.0)
    assert found["worst_cell_vs_best_baseline"] == -2.0
    assert found["worst_cell"] == "digits/10"
    assert found["mean_vs_best_baseline"] == 2.0
    assert found["stage3_vs_stage2"] == 0.0  # +1 and -1
    assert found["stage3_vs_stage2_worst"] == -1.0
    assert found["ece_worst"] == 5.0  # with 200 labels or more
    assert found["ece_worst_any"] == 10.0
    assert found["ece_over_stage2_worst"] == 7.0
    assert (found["cells"], found["cells_compared"], found["places_complete"]) == (2, 2, 0)


def test_a_partial_board_says_what_is_missing_and_an_empty_one_has_no_numbers(tmp_path: Path) -> None:
    board = filled(tmp_path / "cells")
    table = board.table()
    assert "2 are asked for; 2 of 2 cells are not complete" in table.note
    assert "without any number" not in table.note
    assert table.rows[0][-1] == "+6.0 (RBF-SVM, pixels)"
    assert "80.5 ± 0.7" in table.rows[0]
    write_document(board, tmp_path / "docs" / "scoreboard.md", "python -m studies.scoreboard", "2 cores", "demo")
    text = (tmp_path / "docs" / "scoreboard.md").read_text()
    assert "2 of 2 cells are not complete" in text
    assert json.loads(text.partition("```json\n")[2].partition("```")[0]) == board.summary()
    assert (tmp_path / "docs" / "images" / "scoreboard.svg").is_file()
    board.file(Place("digits", "10", 0), "fixmatch").unlink()
    less = Board(board.folder, PLACES)
    assert less.best_baseline(("digits", "10")) is None
    assert less.summary()["cells_compared"] == 1
    more = Board(board.folder, [*PLACES, Place("letters", "4", 0)])
    assert "3 of 3 cells are not complete, and without any number: letters/4" in more.table().note
    assert len(more.table().rows) == 2
    nothing = Board(tmp_path / "none", PLACES).summary()
    assert nothing["mean_vs_best_baseline"] is None
    assert nothing["cells_compared"] == 0


def test_complete_cells_of_another_board_are_taken_and_begun_ones_are_not(tmp_path: Path) -> None:
    board = filled(tmp_path / "cells")
    for seed in (0, 1):
        board.write(Place("digits", "4", seed), "stage-3-student", cell(70 + seed))
    board.write(PLACES[3], "majority", cell(11))
    write_document(board, tmp_path / "board.md", "python -m studies.scoreboard", "2 cores", "demo")
    other = Board(tmp_path / "other", PLACES)
    other.write(PLACES[0], "majority", cell(12))  # begun here, so it goes on here
    assert other.adopt(tmp_path / "board.jsonl") == 1
    again = Board(other.folder, PLACES)
    assert [len(again.cells[place]) for place in PLACES] == [1, 0, len(TITLES), 0]
    assert again.cells[PLACES[2]] == board.cells[PLACES[2]]
    (tmp_path / "run.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(DataError, match="a line is no cell of a scoreboard"):
        other.adopt(tmp_path / "run.jsonl")
    with pytest.raises(DataError, match="there are no cells of a scoreboard"):
        other.adopt(tmp_path / "none.jsonl")


def test_the_recommended_column_is_the_export_unless_validation_establishes_another(tmp_path: Path) -> None:
    board = Board(tmp_path, PLACES[:1])
    place = PLACES[0]
    for column, validated in (
        ("chain", 80.0),
        ("stage-2", 84.0),
        ("logistic", 60.0),
        ("neighbour", 60.0),
        ("svm", 60.0),
    ):
        board.write(place, column, cell(validated) | {"balanced": 50.0})
        assert "recommended" not in board.cells[place]
    board.write(place, "spreading", cell(85.0) | {"balanced": 70.0})  # a standard error of 5.4 points with 100 images
    assert board.cells[place]["recommended"]["setting"] == "chain"
    board.write(place, "spreading", cell(86.0) | {"balanced": 71.0})
    assert board.cells[place]["recommended"]["setting"] == "spreading"
    assert board.values(("digits", "4"), "recommended") == {0: 71.0}
    assert Board(tmp_path, PLACES[:1]).cells[place]["recommended"]["balanced"] == 71.0  # it is no file of its own


def test_a_dry_run_lists_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--sets", "digits", "--seeds", "0", "--regimes", "4", "--only", "simple", "resnet", "--dry"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "digits-4-seed0-simple: no time known yet",
        "digits-4-seed0-resnet: no time known yet",
    ]
    assert list(tmp_path.iterdir()) == []
    assert main(["--budget", "3 hours", "--only", "none"]) == ConfigError.exit_code


def folder_of_images(root: Path, per_class: int = 16) -> Path:
    rng = np.random.default_rng(0)
    for name in ("cats", "dogs"):
        for k in range(per_class):
            (root / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(root / name / f"{k}.png")
    return root


def test_a_folder_gets_a_test_set_of_its_own_and_each_regime_its_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = folder_of_images(tmp_path / "mine")
    found = pictures.prepared("mine", folder)
    train, test = read_manifest(found.train), read_manifest(found.test)
    assert np.bincount(train.labels).tolist() == [12, 12]
    assert np.bincount(test.labels).tolist() == [4, 4]
    four = pictures.split_of(found, "4", 0)
    assert [four.split.counts(name).tolist() for name in ("labelled", "validation", "unlabelled")] == [
        [4, 4],
        [2, 2],
        [6, 6],
    ]
    one = pictures.split_of(found, "1", 1)
    assert one.split.counts("labelled").tolist() == [1, 1]
    monkeypatch.setitem(pictures.REGIMES, "pool", pictures.Regime("a pool", pictures.REGIMES["4"].split, hidden=False))
    pool = pictures.split_of(found, "pool", 0)
    assert pool.split.counts("labelled").tolist() == [4, 4]
    assert (pool.manifest.labels[pool.split.subset("unlabelled")] == -1).all()
    assert len(pool.split.subset("unlabelled")) == 12


def test_glyphs_are_the_same_twice_and_too_few_faces_are_refused(tmp_path: Path) -> None:
    known = glyphs.faces([glyphs.matplotlib_fonts()])
    assert len(known) >= glyphs.LEAST_FACES
    for name in ("a", "b"):
        assert glyphs.write_glyphs(tmp_path / name, known, classes=3, variants=2, seed=0) == 3
    files = sorted(file.relative_to(tmp_path / "a") for file in (tmp_path / "a").rglob("*.png"))
    assert len({file.parts[1] for file in files}) == 3
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)
    test = [file for file in files if file.parts[0] == "test"]
    assert len(test) == pytest.approx(len(files) / 4, abs=3)
    with pytest.raises(DataError, match="only 2 faces were found, and 8 are needed; install a font package"):
        glyphs.write_glyphs(tmp_path / "c", known[:2], classes=3, variants=1, seed=0)


def test_icons_of_a_theme_are_classes_by_folder_and_sizes_of_an_icon_are_one_image(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for context in ("actions", "devices"):
        for k in range(4):
            picture = Image.fromarray(rng.integers(0, 256, (64, 64, 4), dtype=np.uint8))
            for side in (16, 48):
                file = tmp_path / "themes" / "Plain" / f"{side}x{side}" / context / f"icon{k}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                picture.resize((side, side)).save(file)
    found = glyphs.icons([tmp_path / "themes"])
    assert {name: len(files) for name, files in found.items()} == {"actions": 4, "devices": 4}
    assert all("48x48" in str(file) for files in found.values() for file in files)
    assert glyphs.write_icons(tmp_path / "out", [tmp_path / "themes"], least=4, seed=0) == 2
    with pytest.raises(DataError, match="only 0 classes have 5 icons or more"):
        glyphs.write_icons(tmp_path / "none", [tmp_path / "themes"], least=5, seed=0)


def test_the_majority_class_is_right_for_one_class_of_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = pictures.prepared("mine", folder_of_images(tmp_path / "mine"))
    case = pictures.split_of(found, "4", 0)
    cells = simple(case, "mine-4-seed0", 0, Chain(tmp_path / "runs", "recipe", "3T"))
    assert cells["majority"]["balanced"] == 50.0
    assert set(cells) == {"majority", "neighbour", "logistic", "svm", "spreading"}


def test_grey_images_are_read_as_one_channel_and_neighbours_stay_the_same() -> None:
    rng = np.random.default_rng(0)
    grey = rng.random((20, 1, 9)).astype(np.float32).repeat(3, 1).reshape(20, 27)
    samples = Samples(np.arange(20), grey, rng.integers(0, 3, 20))
    one = _first_channel(lambda manifest, sample_indices: samples, None, np.arange(20))
    assert one.values.shape == (20, 9)
    before, after = (fit_baseline("neighbour", s, s, 3).predictions.predicted for s in (samples, one))
    assert (before == after).all()
