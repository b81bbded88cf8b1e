"""Images classified from the shell and from Python, beside files that are no images."""

import csv
import io
import os
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import pipeline
from pipeline import predict as command
from pipeline.errors import ConfigError, DataError, HandoverError
from pipeline.streaming.transforms import eval_views
from tests import warm
from tests.conftest import ROOT
from tests.unit.exports.test_export import exported

CLASSES = tuple("abcdefg")


def predict(*arguments: object, cwd: Path = warm.ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline.predict", *map(str, arguments)]
    return warm.run(command, cwd=cwd)


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the exports of a classifier and of a pretrainer."""
    folder = tmp_path_factory.mktemp("exports")
    exported(folder / "classifier", classes=CLASSES)
    exported(folder / "pretrainer", "pretrainer")
    return folder


@pytest.fixture(scope="module")
def export(exports: Path) -> Path:
    return exports / "classifier"


@pytest.fixture(scope="module")
def digit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image file with a space in its name."""
    path = tmp_path_factory.mktemp("images") / "a digit.png"
    Image.fromarray(pixels(0)).save(path)
    return path


def pixels(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (40, 50, 3), dtype=np.uint8)


def huge_png(path: Path) -> Path:
    """10,000 x 10,000 black pixels in 12 kB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    side = (10_000).to_bytes(4, "big")
    rows = zlib.compress(bytes(10_000 * 1_251))
    head = chunk(b"IHDR", side * 2 + bytes([1, 0, 0, 0, 0]))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", rows) + chunk(b"IEND", b""))
    return path


def test_the_top_five_come_with_their_probabilities_and_a_picture_of_the_evidence(
    export: Path, digit: Path, tmp_path: Path
) -> None:
    done = predict(export, digit, "--cam", tmp_path / "cam")
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    values = [float(word.rstrip("%")) for word in line.removeprefix(str(digit)).split()[1::2]]
    assert len(values) == 5
    assert values == sorted(values, reverse=True)
    assert sum(values) <= 100.5
    (picture,) = (tmp_path / "cam").iterdir()
    with Image.open(picture) as image:
        assert image.size == (224, 224)


def test_each_file_that_is_no_image_gets_a_sentence_and_the_others_are_classified(
    export: Path, digit: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(digit.read_bytes()[:50])
    pdf = tmp_path / "paper.pdf"
    pdf.write_bytes(b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\ntrailer\n<<>>\n%%EOF\n")
    empty = tmp_path / "empty.jpg"
    empty.touch()
    huge = huge_png(tmp_path / "huge.png")
    (tmp_path / "hollow").mkdir()
    first = [tmp_path / "hollow", tmp_path / "*.gif"]  # they are looked up before an image is opened
    bad = [*first, damaged, pdf, empty, huge, tmp_path / "none.png", Path("/dev/null")]
    done = predict(export, damaged, *first, *bad[3:], digit, digit)
    assert done.returncode == 3
    assert len(done.stdout.splitlines()) == 2
    *sentences, summary = done.stderr.splitlines()
    assert all(
        s.startswith(f"error: {path}") and s.count(str(path)) == 1 for s, path in zip(sentences, bad, strict=True)
    )
    assert "100,000,000" in sentences[5] or "10000 x 10000 pixels" in sentences[5]
    assert "holds no images" in sentences[0]
    assert "matches no image" in sentences[1]
    assert summary.startswith(f"classified 2 images; 8 could not be read: {bad[0]}, {bad[1]}, {damaged}, ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["classifier", "--top", "0"], 2, "at least one name"),
        (["classifier", "--batch", "0"], 2, "at least one image"),
        (["classifier", "--csv", "photo.png"], 2, "ends in .csv"),
        (["classifier", "--csv", "/dev/null/table.csv"], 5, "choose another --csv"),
        (["pretrainer"], 2, "holds a pretrainer"),
        (["missing"], 4, "`make chain NAME=mine` makes runs/mine/semi/export"),
    ],
)
def test_a_command_that_makes_no_sense_is_a_sentence(
    exports: Path, digit: Path, tmp_path: Path, arguments: list[str], code: int, said: str
) -> None:
    """In a folder without runs: where there are some, a missing export's sentence names theirs."""
    folder, *options = arguments
    done = predict(exports / folder, digit, *options, cwd=tmp_path)
    assert done.returncode == code
    assert said in done.stderr


def encoded(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="png")
    return file.getvalue()


def test_every_form_of_an_image_gets_the_prediction_of_the_model(export: Path, tmp_path: Path) -> None:
    """The logits are those of the model on the evaluation's view, for all forms alike."""
    classifier = pipeline.load(export)
    assert classifier.classes == CLASSES == classifier.card.classes
    image = pixels(3)
    path = tmp_path / "image.png"
    path.write_bytes(encoded(image))
    view = eval_views((32, 32), mean=(0.5,) * 3, std=(0.5,) * 3)(image, 0)["images"]
    with torch.no_grad():
        expected = classifier.model(view[None])[0].softmax(-1)
    forms = [path, str(path), encoded(image), Image.fromarray(image), image, tmp_path]
    found = classifier.predict(forms, top=7)
    assert [p.source for p in found] == [str(path), str(path), "image 2", "image 3", "image 4", str(path)]
    for prediction in found:
        assert prediction.names == tuple(CLASSES[c] for c in expected.argsort(descending=True))
        torch.testing.assert_close(torch.tensor(prediction.probabilities), expected.sort(descending=True).values)
        assert (prediction.name, prediction.probability) == (prediction.names[0], prediction.probabilities[0])


def test_a_folder_is_predicted_in_the_order_of_its_paths_and_across_batches(export: Path, tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    names = sorted([f"{k:02d}.png" for k in range(38)] + ["below/a.png", "below/b.png"])
    for seed, name in enumerate(names):
        (tmp_path / name).write_bytes(encoded(pixels(seed)))
    (tmp_path / "notes.txt").write_text("no image")
    classifier = pipeline.load(export)
    found = classifier.predict(tmp_path)
    assert [p.source for p in found] == [str(tmp_path / name) for name in names]
    for seed in (0, 31, 32, 39):
        (alone,) = classifier.predict(pixels(seed))
        assert found[seed].names == alone.names
        assert found[seed].probabilities == pytest.approx(alone.probabilities, abs=1e-5)


def photos(folder: Path) -> list[Path]:
    """Make images in a folder of folders, beside files that are none, and return their sorted paths."""
    names = ["a b.png", "cats/0.png", "cats/deep/2.png", "cats[1].png", "dogs/1.PNG"]
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encoded(pixels(seed)))
    (folder / "notes.txt").write_text("no image")
    return [folder / name for name in names]


def test_folders_and_patterns_stand_for_their_images_in_the_order_of_their_paths(export: Path, tmp_path: Path) -> None:
    paths = photos(tmp_path)
    classifier = pipeline.load(export)
    cases: list[tuple[str, list[Path]]] = [
        ("", paths),
        ("*", [*paths, tmp_path / "notes.txt"]),
        ("*.png", [paths[0], paths[3]]),
        ("**/*.png", paths[:4]),
        ("**/[0-9].*", [paths[1], paths[2], paths[4]]),
        ("cats*", paths[1:4]),
        ("cats/**", paths[1:3]),
        ("cats[1].png", [paths[3]]),
    ]
    for pattern, expected in cases:
        refused: list[str] = []
        found = classifier.predict(tmp_path / pattern, on_error=lambda source, _, to=refused: to.append(source))
        assert sorted([*(p.source for p in found), *refused]) == sorted(map(str, expected)), pattern
        assert [p.source for p in found] == [str(path) for path in expected if path.suffix != ".txt"], pattern
        assert refused == [str(path) for path in expected if path.suffix == ".txt"]
    with pytest.raises(DataError, match=r"\*\.gif matches no image"):
        classifier.predict(tmp_path / "*.gif")


def test_the_table_has_a_row_for_each_image_and_is_the_same_for_every_batch(export: Path, tmp_path: Path) -> None:
    paths = photos(tmp_path / "photos")
    broken = tmp_path / "photos" / "cats" / "1, broken.png"
    broken.write_bytes(paths[0].read_bytes()[:60])
    tables = []
    for batch in (1, 2, 32):
        table = tmp_path / "tables" / f"{batch}.csv"
        done = predict(export, paths[4], tmp_path / "photos", "--csv", table, "--top", "3", "--batch", batch)
        assert (done.returncode, done.stdout) == (3, ""), done.stderr
        sentence, summary = done.stderr.splitlines()
        assert sentence.startswith(f"error: {broken}: ")
        assert summary.startswith(f"classified 6 images, see {table}; 1 could not be read: {broken}; 1 other files")
        with table.open(newline="") as file:
            tables.append(list(csv.DictReader(file)))
    classifier = pipeline.load(export)
    for row, path in zip(tables[0], [paths[4], *paths], strict=True):
        (alone,) = classifier.predict(path, top=3)
        columns = ["file", "class", "probability", "class_2", "probability_2", "class_3", "probability_3"]
        assert list(row) == columns
        assert row["file"] == str(path)
        assert tuple(row[name] for name in columns[1::2]) == alone.names
        assert [float(row[name]) for name in columns[2::2]] == pytest.approx(alone.probabilities, abs=2e-6)
    for other in tables[1:]:
        for row, same in zip(other, tables[0], strict=True):
            assert (row["file"], row["class"]) == (same["file"], same["class"])
            assert float(row["probability"]) == pytest.approx(float(same["probability"]), abs=2e-6)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_a_bar_with_counts_unless_lines_are_printed_there(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = photos(tmp_path)
    classifier = pipeline.load(export)
    monkeypatch.setattr(command, "BAR_AFTER_SECONDS", 0)
    for out, table, barred in (
        (io.StringIO, None, True),
        (Terminal, tmp_path / "t.csv", True),
        (Terminal, None, False),
    ):
        terminal = Terminal()
        monkeypatch.setattr("sys.stderr", terminal)
        monkeypatch.setattr("sys.stdout", out())
        assert command.predict(classifier, [str(tmp_path)], batch=1, table=table) == 0
        assert (f"{len(paths)}/{len(paths)}" in terminal.getvalue()) == barred, terminal.getvalue()


def test_names_that_are_no_unicode_are_shown_with_their_bytes(export: Path, tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.png")).write_bytes(encoded(pixels(0)))
    done = predict(export, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{tmp_path}/caf\\xe9.png  ")


def test_an_unreadable_image_is_an_error_or_is_left_out(export: Path, tmp_path: Path) -> None:
    classifier, good = pipeline.load(export), pixels(0)
    bad = [b"no image", np.zeros((4, 4, 3)), tmp_path / "none.png", 7]
    for image in bad:
        with pytest.raises(DataError, match=r"not a readable image|of float64; give|no such file|a int is no image"):
            classifier.predict([good, image])
    refused: list[str] = []
    found = classifier.predict([*bad, good], on_error=lambda source, error: refused.append(source))
    assert refused == ["image 0", "image 1", str(tmp_path / "none.png"), "image 3"]
    assert [p.source for p in found] == ["image 4"]
    with pytest.raises(DataError, match="holds no images"):
        classifier.predict(tmp_path)
    with pytest.raises(ConfigError, match="at least one"):
        classifier.predict(good, top=0)


def test_an_image_of_pillow_is_seen_as_its_file_is(export: Path, tmp_path: Path) -> None:
    """Its orientation and its transparency too."""
    classifier = pipeline.load(export)
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = Image.fromarray(pixels(3)).resize((40, 20))
    stored.putalpha(Image.linear_gradient("L").resize((40, 20)))
    stored.save(tmp_path / "photo.png", exif=exif)
    (seen,) = classifier.predict(tmp_path / "photo.png")
    (same,) = classifier.predict(Image.open(tmp_path / "photo.png"))
    assert seen.probabilities == same.probabilities
    ground = Image.new("RGB", (40, 20), "white")
    ground.paste(stored, mask=stored.getchannel("A"))
    (upright,) = classifier.predict(np.array(ground.transpose(Image.Transpose.ROTATE_270)))
    assert seen.probabilities == upright.probabilities


def test_only_a_whole_classifier_is_loaded(exports: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds a pretrainer"):
        pipeline.load(exports / "pretrainer")
    with pytest.raises(HandoverError, match="no export at"):
        pipeline.load(tmp_path / "none")


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = (
        "import sys, pipeline; dir(pipeline); print(sorted({'torch', 'numpy', 'pydantic', 'yaml'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    assert pipeline.__version__
    stub = (ROOT / "pipeline" / "__init__.pyi").read_text()
    for name in pipeline.__all__:
        assert getattr(pipeline, name)
        assert f"as {name}\n" in stub or f"{name}: str" in stub
    with pytest.raises(AttributeError, match="has no attribute 'predictor'"):
        _ = pipeline.predictor


def test_ground_and_limit_can_be_chosen(export: Path, tmp_path: Path) -> None:
    drawing = np.zeros((40, 50, 4), np.uint8)
    drawing[..., :3] = pixels(3)
    drawing[:20, :, 3] = 255
    Image.fromarray(drawing).save(tmp_path / "cut.png")
    for ground in ((255, 255, 255), (0, 0, 255)):
        whole = np.where(drawing[..., 3:] == 255, drawing[..., :3], np.array(ground, np.uint8))
        given = pipeline.load(export, ground=ground)
        assert given.predict(tmp_path / "cut.png")[0].probabilities == given.predict(whole)[0].probabilities
    shown = [predict(export, tmp_path / "cut.png", *more).stdout for more in ((), ("--ground", "0,0,255"))]
    assert shown[0] != shown[1]
    refused = predict(export, tmp_path / "cut.png", "--max-pixels", "1999")
    assert refused.returncode == 3
    assert "40 pixels; at most 1,999 are decoded" in refused.stderr
    for option in (("--ground", "0,0,256"), ("--ground", "white"), ("--max-pixels", "0")):
        assert predict(export, tmp_path / "cut.png", *option).returncode == 2
