"""The check before a training finds what is planted, and nothing else."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data import main
from pipeline.datasets.check.duplicates import MAX_BITS, MAX_INDEX_BITS, connected_groups, equal_groups, similar_pairs
from pipeline.datasets.check.finding import shortened
from pipeline.datasets.check.measure import measure, perceptual_hash
from pipeline.datasets.check.quick import quick_check
from pipeline.datasets.check.survey import Survey, survey
from pipeline.datasets.config import SplitConfig
from pipeline.datasets.manifest import Manifest, read_manifest, write_manifest
from pipeline.datasets.splits import make_split, write_split
from pipeline.datasets.tars import scan_shard


def photograph(seed: int, size: tuple[int, int] = (96, 64)) -> Image.Image:
    """Smooth coloured noise with structure at several scales, unlike any of another seed."""
    random = np.random.default_rng(seed)
    layers = [
        np.asarray(Image.fromarray(random.integers(0, 255, (n, n, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC))
        for n in (3, 6, 12)
    ]
    return Image.fromarray(np.mean(layers, axis=0).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def dataset(folder: Path, images: list[tuple[bytes, int]], classes: tuple[str, ...] = ("cat", "dog")) -> Manifest:
    """A dataset of bytes and labels; -1 everywhere if there are no classes."""
    folder.mkdir(parents=True)
    with tarfile.open(folder / "000000.tar", "w") as tar:
        for k, (content, label) in enumerate(images):
            for name, data in ((f"s{k:04}.cls", str(label).encode()), (f"s{k:04}.png", content)):
                if classes or not name.endswith("cls"):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return write_manifest(folder, classes, [scan_shard(folder / "000000.tar", len(classes) or None)])


def names(found: Survey) -> dict[str, int]:
    return {finding.name: finding.count for finding in found.findings if finding.name != "sizes"}


@pytest.fixture(scope="module")
def clean() -> list[tuple[bytes, int]]:
    return [(encoded(photograph(k)), k % 2) for k in range(20)]


def test_a_clean_dataset_has_no_findings_and_one_size(clean, tmp_path):
    found = survey([dataset(tmp_path / "a", clean)])
    assert names(found) == {}
    assert found.finding("sizes").text == "all images have 96 x 64 pixels."


def test_copies_are_found_by_their_bytes_and_by_their_pixels(clean, tmp_path):
    other_bytes = encoded(photograph(1), compress_level=0)
    found = survey([dataset(tmp_path / "a", [*clean, clean[0], clean[0], (other_bytes, 1)])])
    assert names(found) == {"duplicates": 3}
    groups = found.finding("duplicates").groups
    assert [[example.sample_index for example in group.examples] for group in groups] == [[0, 20, 21], [1, 22]]
    assert "1 of them with equal pixels in different files" in found.finding("duplicates").text


def test_labels_that_differ_between_copies_are_a_conflict_and_a_missing_label_is_none(clean, tmp_path):
    found = survey([dataset(tmp_path / "a", [*clean, (clean[3][0], 0)])])
    assert names(found) == {"duplicates": 1, "label-conflicts": 1}
    classes = sorted(example.caption for example in found.finding("label-conflicts").groups[0].examples)
    assert classes == ["cat", "dog"]
    unlabelled = dataset(tmp_path / "b", [clean[3]], ())
    assert "label-conflicts" not in names(survey([dataset(tmp_path / "c", clean), unlabelled]))


def test_a_conflict_goes_by_the_names_of_classes_not_by_their_numbers(clean, tmp_path):
    train = dataset(tmp_path / "a", clean)
    same = dataset(tmp_path / "b", [(clean[0][0], 1), (clean[1][0], 0)], ("dog", "cat"))
    assert "label-conflicts" not in names(survey([train, same]))


@pytest.mark.parametrize("change", ["jpeg", "half", "brighter"])
def test_changed_copies_look_alike(clean, tmp_path, change):
    image = photograph(5)
    content = {
        "jpeg": lambda: encoded(image, "JPEG", quality=60),
        "half": lambda: encoded(image.resize((48, 32), Image.Resampling.BICUBIC)),
        "brighter": lambda: encoded(image.point(lambda value: min(255, int(value * 1.1)))),
    }[change]()
    found = survey([dataset(tmp_path / "a", clean), dataset(tmp_path / "b", [(content, 0)])])
    assert names(found) == {"test-like-training": 1, "alike-label-conflicts": 1, "untested-classes": 1}
    pair = found.finding("test-like-training").groups[0].examples
    assert [(example.dataset, example.sample_index) for example in pair] == [(0, 5), (1, 0)]


def test_test_images_in_training_end_with_code_3_and_are_told_first(clean, tmp_path, capsys):
    dataset(tmp_path / "train", clean)
    dataset(tmp_path / "test", [*clean[:3], (encoded(photograph(99)), 0), (encoded(photograph(98)), 1)])
    page = tmp_path / "page.html"
    assert main(["check", str(tmp_path / "train"), str(tmp_path / "test"), "--html", str(page)]) == 3
    told = capsys.readouterr()
    assert "error: 3 test images are in the training set" in told.err
    assert told.out.index("Test images in the training set: 3 images") < told.out.index("Sizes in")
    assert "train/s0000 (cat) = test/s0000 (cat)" in told.out
    html = page.read_text()
    assert "Test images in the training set" in html
    assert "http" not in html.replace("http-equiv", "")
    assert html.count("data:image/") >= 6


def test_findings_alone_end_with_code_0(clean, tmp_path, capsys):
    dataset(tmp_path / "train", [*clean, clean[0]])
    assert main(["check", str(tmp_path / "train")]) == 0
    assert "1 image is there more than once, with 1 needless copy." in capsys.readouterr().out


def test_black_constant_and_unreadable_images_are_named(clean, tmp_path):
    odd = [
        (encoded(Image.new("RGB", (9, 9))), 0),
        (encoded(Image.new("RGB", (9, 9), (255, 255, 255))), 0),
        (b"this is no image", 1),
    ]
    found = survey([dataset(tmp_path / "a", [*clean, *odd])])
    assert names(found) == {"constant": 2, "unreadable": 1}
    assert "1 of them is black" in found.finding("constant").text
    assert [group.examples[0].sample_index for group in found.finding("unreadable").groups] == [22]


def test_twelve_bits_in_a_file_of_sixteen_are_told_since_they_are_nearly_black(clean, tmp_path):
    levels = np.asarray(photograph(60).convert("L")).astype(np.uint16)
    odd = [(encoded(Image.fromarray(levels * 16)), 0), (encoded(Image.fromarray(levels * 257)), 0)]
    found = survey([dataset(tmp_path / "a", [*clean, *odd])])
    assert names(found) == {"faint": 1}
    assert [group.examples[0].sample_index for group in found.finding("faint").groups] == [20]


def test_a_long_name_keeps_both_its_ends():
    name = "holidays/" + "x" * 80 + "/IMG_0042"
    assert shortened(name, 60).startswith("holidays/")
    assert shortened(name, 60).endswith("/IMG_0042")
    assert len(shortened(name, 60)) == 60
    assert shortened("short", 5) == "short"


def test_a_folder_of_images_is_named_as_it_was_given(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    for k in range(4):
        path = tmp_path / f"photos/{'ab'[k % 2]}/{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        photograph(k).save(path)
    assert main(["check", str(tmp_path / "photos"), "--processes", "1"]) == 0
    text = capsys.readouterr().out
    assert f"{tmp_path / 'photos'}: 4 images, 2 classes, 4 labels" in text
    assert ".cache" not in text


def test_extremes_of_size_and_shape_are_named(clean, tmp_path):
    odd = [(encoded(photograph(k, size)), 0) for k, size in ((50, (300, 10)), (51, (7, 200)), (52, (5, 4)))]
    text = survey([dataset(tmp_path / "a", [*clean, *odd])]).finding("sizes").text
    assert text == "4 different sizes: smallest 5 x 4, largest 96 x 64, narrowest 7 x 200, widest 300 x 10 pixels."


def test_thin_classes_and_labels_spent_on_validation_are_counted(clean, tmp_path):
    classes = ("cat", "dog", "eel", "fox")
    train = dataset(tmp_path / "a", [*clean, (encoded(photograph(70)), 2)], classes)
    assert names(survey([train])) == {"class-without-label": 1, "few-labels": 1}
    full = dataset(tmp_path / "b", clean)
    split = make_split(full, SplitConfig(labelled=0.3, rounding="nearest", validation_per_class=4), seed=0)
    found = survey([full], split)
    assert names(found) == {"few-labels": 2, "validation-labels": 8}
    assert "8 of 12 labels are held out for validation (67%); 4 are left" in found.finding("validation-labels").text


def test_a_validation_image_that_is_also_trained_on_is_found(clean, tmp_path):
    train = dataset(tmp_path / "a", [*clean, *clean])
    split = make_split(train, SplitConfig(validation_per_class=5), seed=0)
    assert names(survey([train], split))["validation-in-training"] >= 1


def test_a_dataset_without_classes_is_checked(clean, tmp_path):
    found = survey([dataset(tmp_path / "a", [*clean, clean[0]], ()), dataset(tmp_path / "b", clean[:1], ())])
    assert names(found) == {"test-in-training": 1, "duplicates": 1, "no-classes": 0}


def test_processes_do_not_change_what_is_measured(train: Manifest):
    assert (measure(train, 1) == measure(train, 3)).all()


def test_the_digits_and_their_test_set_have_no_copies(digits_folder: Path, train: Manifest):
    assert names(survey([train, read_manifest(digits_folder / "test")], processes=2)) == {}


def test_the_perceptual_hash_is_imagehashs():
    """Values of imagehash 4.3.2, `phash(image, hash_size=16)`."""
    random = np.random.default_rng(0)
    for size, start in (((8, 8), "c6c2d4a5"), ((40, 70), "f791d54e"), ((375, 500), "9339a6ce")):
        image = Image.fromarray(random.integers(0, 255, (12, 12, 3), np.uint8)).resize(size)
        assert perceptual_hash(np.asarray(image)).tobytes().hex()[:8] == start


def test_similar_pairs_are_those_of_a_comparison_of_all_pairs():
    random = np.random.default_rng(0)
    hashes = random.integers(0, 256, (40, 32), np.uint8)
    near = np.repeat(hashes, 8, axis=0)
    for k in range(len(near)):
        for bit in random.integers(0, 256, k % 40):
            near[k, bit // 8] ^= 1 << (bit % 8)
    colours = random.integers(100, 130, (len(near), 3), np.uint8)
    bits = np.unpackbits(near, axis=1).reshape(-1, 16, 16)
    expected = [
        (i, j)
        for i in range(len(near))
        for j in range(i + 1, len(near))
        if (bits[i] != bits[j]).sum() <= MAX_BITS
        and (bits[i] != bits[j])[:8, :8].sum() <= MAX_INDEX_BITS
        and np.abs(colours[i].astype(int) - colours[j]).max() <= 24
    ]
    pairs, complete = similar_pairs(near, colours)
    assert complete
    assert len(expected) > 50
    assert [tuple(pair) for pair in pairs.tolist()] == expected


def test_the_frames_of_a_film_are_one_group_found_in_linear_time():
    random = np.random.default_rng(0)
    count = 3000
    film = np.repeat(random.integers(0, 256, (1, 32), np.uint8), count, axis=0)
    bits = random.integers(128, 256, (count, 3))  # outside the low frequencies: all bands are equal
    for column in bits.T:
        film[np.arange(count), column // 8] ^= (1 << (column % 8)).astype(np.uint8)
    pairs, complete = similar_pairs(film, np.full((count, 3), 99, np.uint8))
    assert not complete
    assert len(pairs) <= 5 * 16 * count
    assert [len(group) for group in connected_groups(pairs, count)] == [count]


def test_groups_are_those_of_equal_keys_and_of_connected_pairs():
    keys = np.array([b"b", b"a", b"b", b"c", b"a", b"b"], "S16")
    assert [group.tolist() for group in equal_groups(keys)] == [[0, 2, 5], [1, 4]]
    assert [g.tolist() for g in connected_groups(np.array([[0, 3], [3, 7], [2, 9]]), 12)] == [[0, 3, 7], [2, 9]]
    assert equal_groups(np.empty(0, "S16")) == []


def test_the_quick_check_finds_copies_by_bytes_and_thin_classes(clean, tmp_path):
    train = dataset(tmp_path / "a", clean, ("cat", "dog", "eel"))
    test = dataset(tmp_path / "b", [*clean[:4], (encoded(photograph(99)), 0)], ("cat", "dog", "eel"))
    found = {finding.name: finding.count for finding in quick_check(train, [test], None)}
    assert found == {"test-in-training": 4, "class-without-label": 1, "untested-classes": 1}


def test_a_split_of_another_dataset_and_a_page_that_is_no_html_are_refused(clean, tmp_path, capsys):
    train, other = dataset(tmp_path / "a", clean), dataset(tmp_path / "b", clean[:9])
    write_split(make_split(train, SplitConfig(), seed=0), tmp_path / "split.json")
    assert main(["check", str(other.folder), "--split", str(tmp_path / "split.json")]) == 3
    assert "made for another dataset" in capsys.readouterr().err
    assert main(["check", str(train.folder), "--html", str(tmp_path / "page.pdf")]) == 2
    assert "give a name that ends in .html" in capsys.readouterr().err
