"""CIFAR, STL-10 and SVHN, from files of their formats that the test writes; damaged and hostile ones end in a sentence."""

import io
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data import main
from pipeline.datasets.convert.benchmarks.pickles import read_pickle
from pipeline.datasets.convert.class_map import read_class_map
from pipeline.datasets.manifest import Manifest, read_image, read_manifest
from pipeline.errors import DataError

RNG = np.random.default_rng(0)
NAMES10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
NAMES100 = [f"fine{i:03d}" for i in range(100)]

# How Python 2 pickled a batch with protocol 2: texts are bytes, and arrays are rebuilt by NumPy's old module.
P2_HEAD = b"\x80\x02}q\x01("


def python2_text(text: bytes) -> bytes:
    return b"U" + struct.pack("<B", len(text)) + text if len(text) < 256 else b"T" + struct.pack("<I", len(text)) + text


def python2_batch(data: np.ndarray, labels: list[int], key: bytes) -> bytes:
    """A batch as cPickle of Python 2 wrote it, opcode by opcode."""
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n"
        b"cnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01" + b"".join(b"M" + struct.pack("<H", side) for side in data.shape) + b"\x86"
        b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89" + python2_text(data.tobytes()) + b"tb"
    )
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return P2_HEAD + python2_text(b"data") + array + python2_text(key) + numbers + b"u."


def images(count: int, side: int = 32) -> np.ndarray:
    return RNG.integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def check(manifest: Manifest, pixels: np.ndarray, labels: list[int], first: str = "") -> None:
    """Every image of the dataset is the array's, bit for bit, and has its label."""
    assert manifest.num_samples >= len(pixels)
    of = {manifest.key(i): i for i in range(manifest.num_samples)}
    for number, (picture, label) in enumerate(zip(pixels, labels, strict=True)):
        sample = of[f"{first}-{number:06d}"]
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(read_image(manifest, sample)))), picture)
        assert manifest.labels[sample] == label


def write_cifar(folder: Path, layout: str) -> tuple[np.ndarray, list[int], np.ndarray, list[int]]:
    """Two images a training file, three in the test file."""
    folder.mkdir(parents=True)
    ten, python = "10-" in layout, "bin" not in layout
    files = [f"data_batch_{i}" for i in range(1, 6)] if ten else ["train"]
    train, test, classes = images(2 * len(files)), images(3), 10 if ten else 100
    labels = [(7 * i + 3) % classes for i in range(len(train) + 3)]

    def rows(pictures: np.ndarray) -> np.ndarray:
        return pictures.transpose(0, 3, 1, 2).reshape(len(pictures), -1)

    parts = [(name, train[2 * i : 2 * i + 2], labels[2 * i : 2 * i + 2]) for i, name in enumerate(files)]
    parts.append(("test_batch" if ten else "test", test, labels[len(train) :]))
    for name, pictures, known in parts:
        if python:
            key = b"labels" if ten else b"fine_labels"
            (folder / name).write_bytes(python2_batch(rows(pictures), known, key))
        else:
            given = np.array(known, np.uint8)[:, None]
            given = given if ten else np.concatenate([given // 5, given], 1)
            np.concatenate([given, rows(pictures)], 1).tofile(folder / f"{name}.bin")
    names = NAMES10 if ten else NAMES100
    if python:
        entry = "label_names" if ten else "fine_label_names"
        with (folder / ("batches.meta" if ten else "meta")).open("wb") as file:
            pickle.dump({entry: names, "num_vis": 3072}, file, protocol=2)
    else:
        (folder / ("batches.meta.txt" if ten else "fine_label_names.txt")).write_text("\n".join(names) + "\n")
    return train, labels[: len(train)], test, labels[len(train) :]


LAYOUTS = ["cifar-10-batches-py", "cifar-10-batches-bin", "cifar-100-python", "cifar-100-binary"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cifar_is_converted_bit_for_bit(tmp_path: Path, layout: str) -> None:
    train, labels, test, held_out = write_cifar(tmp_path / "in" / layout, layout)
    assert main(["convert", "cifar", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--processes", "1"]) == 0
    check(read_manifest(tmp_path / "out" / "train"), train, labels, "train")
    check(read_manifest(tmp_path / "out" / "test"), test, held_out, "test")
    assert list(read_manifest(tmp_path / "out" / "test").classes) == (NAMES10 if "10-" in layout else NAMES100)


def test_todays_numpy_writes_batches_that_are_read_too(tmp_path: Path) -> None:
    data = images(2).reshape(2, -1)
    for protocol in (2, 4):
        (tmp_path / "batch").write_bytes(pickle.dumps({"data": data, "labels": [1, 2]}, protocol))
        found = read_pickle(tmp_path / "batch")
        assert np.array_equal(found["data"], data)
        assert found["labels"] == [1, 2]


class Evil:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch /tmp/cifar-was-run",)


def big_array(shape: tuple[int, ...]) -> bytes:
    batch = python2_batch(np.zeros((1, 4), np.uint8), [0], b"labels")
    return batch.replace(b"M\x01\x00M\x04\x00\x86", b"".join(b"J" + struct.pack("<i", s) for s in shape) + b"\x86")


HOSTILE = {
    "a function": pickle.dumps({"data": Evil()}),
    "numpy's own loader": b"cnumpy\nload\n(S'x'\ntR.",
    "an attribute of numpy": b"\x80\x04\x8c\x05numpy\x8c\x0csave.__self__\x93.",
    "a shape of 4 TB": big_array((2**20, 2**22)),
    "negative sides": big_array((-1, -4)),
    "objects in an array": pickle.dumps({"data": np.array([{}, []], object)}),
    "a huge text": b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b"x.",
    "half a batch": python2_batch(np.zeros((2, 3072), np.uint8), [0, 1], b"labels")[:-3000],
    "no table": pickle.dumps([1, 2]),
    "nothing": b"",
    "noise": bytes(range(256)),
    "a persistent id": b"\x80\x02U\x01aQ.",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_or_damaged_pickle_runs_nothing_and_ends_in_a_sentence(tmp_path: Path, name: str) -> None:
    Path("/tmp/cifar-was-run").unlink(missing_ok=True)
    (tmp_path / "batch").write_bytes(HOSTILE[name])
    with pytest.raises(DataError, match=r"is damaged|is not read|holds no table|does not fit"):
        read_pickle(tmp_path / "batch")
    assert not Path("/tmp/cifar-was-run").exists()


def test_a_huge_index_of_the_memo_takes_no_memory(tmp_path: Path) -> None:
    """The reader in C would allocate 2^31 entries here."""
    (tmp_path / "batch").write_bytes(b"\x80\x02}r\xff\xff\xff\x7f.")
    assert read_pickle(tmp_path / "batch") == {}


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda f: (f / "data_batch_3").unlink(), "data_batch_3 cannot be read"),
        (lambda f: (f / "data_batch_2").write_bytes(b"\x80\x02}."), "no table `data`"),
        (
            lambda f: (f / "data_batch_2").write_bytes(python2_batch(np.zeros((2, 3072), np.uint8), [1], b"labels")),
            "no list `labels` of 2",
        ),
        (
            lambda f: (f / "data_batch_2").write_bytes(
                python2_batch(np.zeros((2, 3072), np.uint8), [1, 10], b"labels")
            ),
            "has labels 1 to 10 for 10 classes",
        ),
        (lambda f: (f / "batches.meta").write_bytes(pickle.dumps({"label_names": ["a"]})), "1 class names, not 10"),
        (lambda f: (f / "data_batch_1").unlink(), "has no files of CIFAR"),
    ],
)
def test_a_damaged_cifar_is_exit_3(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None], sentence: str
) -> None:
    write_cifar(tmp_path / "cifar", LAYOUTS[0])
    damage(tmp_path / "cifar")
    assert main(["convert", "cifar", str(tmp_path / "cifar"), "--out", str(tmp_path / "out")]) == 3
    assert sentence in capsys.readouterr().err


def test_a_binary_file_of_another_length_is_exit_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_cifar(tmp_path / "cifar", LAYOUTS[1])
    with (tmp_path / "cifar" / "test_batch.bin").open("ab") as file:
        file.write(b"x")
    assert main(["convert", "cifar", str(tmp_path / "cifar"), "--out", str(tmp_path / "out")]) == 3
    assert "no multiple of 3073" in capsys.readouterr().err


def write_stl10(folder: Path) -> tuple[np.ndarray, list[int]]:
    folder.mkdir(parents=True)
    pictures, labels = images(12, 96), [i % 10 for i in range(12)]
    stored = pictures.transpose(0, 3, 2, 1)  # by colour, column and row
    np.ascontiguousarray(stored).tofile(folder / "train_X.bin")
    np.array(labels, np.uint8).__add__(1).tofile(folder / "train_y.bin")
    np.ascontiguousarray(stored[:3]).tofile(folder / "test_X.bin")
    np.array([1, 2, 10], np.uint8).tofile(folder / "test_y.bin")
    np.ascontiguousarray(stored[::-1][:5]).tofile(folder / "unlabeled_X.bin")
    (folder / "class_names.txt").write_text("\n".join(NAMES10))
    return pictures, labels


def test_stl10_keeps_its_unlabelled_images_without_a_label(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures, labels = write_stl10(tmp_path / "in" / "stl10_binary")
    command = ["convert", "stl10", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--processes", "1"]
    assert main(command) == 0
    train = read_manifest(tmp_path / "out" / "train")
    check(train, pictures, labels, "train")
    check(train, pictures[::-1][:5], [-1] * 5, "unlabelled")
    check(read_manifest(tmp_path / "out" / "test"), pictures[:3], [0, 1, 9], "test")
    (tmp_path / "in" / "stl10_binary" / "unlabeled_X.bin").write_bytes(b"123")
    assert main([*command[:-3], str(tmp_path / "other")]) == 3
    assert "no multiple of 27648" in capsys.readouterr().err
    (tmp_path / "in" / "stl10_binary" / "train_y.bin").write_bytes(b"\x01")
    assert main([*command[:-3], str(tmp_path / "other")]) == 3
    assert "1 labels for the 12 images" in capsys.readouterr().err


@pytest.mark.parametrize("compressed", [False, True])
def test_svhn_is_converted_bit_for_bit_and_its_ten_is_a_zero(tmp_path: Path, compressed: bool) -> None:
    from scipy.io import savemat

    parts = {name: (images(4), [10, 1, 9, 5]) for name in ("train", "test", "extra")}
    for name, (pictures, labels) in parts.items():
        table = {"X": pictures.transpose(1, 2, 3, 0), "y": np.array(labels, np.uint8)[:, None]}
        savemat(tmp_path / f"{name}_32x32.mat", table, do_compression=compressed)
    assert main(["convert", "svhn", str(tmp_path), "--out", str(tmp_path / "out"), "--extra", "--processes", "1"]) == 0
    train = read_manifest(tmp_path / "out" / "train")
    assert train.num_samples == 8
    for name in ("train", "extra"):
        check(train, parts[name][0], [0, 1, 9, 5], name)
    check(read_manifest(tmp_path / "out" / "test"), parts["test"][0], [0, 1, 9, 5], "test")


def test_a_damaged_svhn_is_exit_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from scipy.io import savemat

    def attempt() -> str:
        assert main(["convert", "svhn", str(tmp_path), "--out", str(tmp_path / "out")]) == 3
        return capsys.readouterr().err

    assert "cannot be read" in attempt()
    path = tmp_path / "train_32x32.mat"
    path.write_bytes(b"MATLAB 7.3 MAT-file, " + bytes(500))
    assert "format 7.3, which is not read" in attempt()
    path.write_bytes(struct.pack("<5i", 0, 1, 1, 0, 2**31 - 1) + bytes(500))  # MATLAB 4, with a name of 2 GiB
    assert "is no MATLAB file of version 5 to 7" in attempt()
    path.write_bytes(b"MATLAB 5.0 MAT-file".ljust(124) + b"\x00\x01IM" + bytes(range(200)))
    assert "train_32x32.mat" in attempt()
    savemat(path, {"X": np.zeros((32, 32, 3, 2), np.float64), "y": np.ones((2, 1))})
    assert "has no X of 32 x 32 x 3 x n bytes" in attempt()
    savemat(path, {"X": np.zeros((32, 32, 3, 2), np.uint8), "y": np.ones((3, 1))})
    assert "labels of the shape (3, 1) for 2 images" in attempt()
    savemat(path, {"X": np.zeros((32, 32, 3, 2), np.uint8), "y": np.array([[1], [11]], np.uint8)})
    assert "labels 1 to 11 for 10 classes" in attempt()


def test_a_class_map_makes_coarser_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for wnid in ("n01", "n02", "n03"):
        (tmp_path / "in" / wnid).mkdir(parents=True)
        Image.fromarray(images(1)[0]).save(tmp_path / "in" / wnid / "a.png")
    table = tmp_path / "map.txt"
    table.write_text("# ours\nn01,domestic cat\nn02\tdog\nn03 domestic cat\nn04 bird\n")
    command = [
        "convert",
        "imagefolder",
        str(tmp_path / "in"),
        "--out",
        str(tmp_path / "out"),
        "--class-map",
        str(table),
    ]
    assert main(command) == 0
    manifest = read_manifest(tmp_path / "out")
    assert list(manifest.classes) == ["bird", "dog", "domestic cat"]
    of = {manifest.key(i).split("/")[0]: int(manifest.labels[i]) for i in range(3)}
    assert of == {"n01": 2, "n02": 1, "n03": 2}
    table.write_text("n01440764_10026.JPEG n01428580\nn01440764_10027.JPEG n01428580\nn01443537_16.JPEG n02512938\n")
    assert read_class_map(table) == {"n01440764": "n01428580", "n01443537": "n02512938"}  # ImageNet-127's own list
    for text, sentence in (
        ("n01 a\nn02 b\n", "no line for 1 of the 3 classes"),
        ("n01 a\nn01 b\n", "belongs to 'a' already"),
        ("n01\n", "is no pair"),
        ("n01 a\nn02 a\n", "has 1 coarser classes"),
    ):
        table.write_text(text)
        assert main([*command[:4], str(tmp_path / "other"), *command[5:]]) == 3
        assert sentence in capsys.readouterr().err
