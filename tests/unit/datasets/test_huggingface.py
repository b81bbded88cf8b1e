"""Datasets of Hugging Face become shards, from this disk and from a cache of the hub, with every image accounted for."""

import http.server
import os
import subprocess
import sys
import threading
import tomllib
from pathlib import Path
from typing import Any

import pytest

from pipeline.datasets.manifest import read_image, read_manifest
from tests.unit.datasets.sources import convert, image, labels, put

ROOT = Path(__file__).parents[3]
library: Any = pytest.importorskip("datasets", reason="the library of Hugging Face is an optional extra")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    for name in ("HF_DATASETS_CACHE", "HF_CACHE_HOME", "DOWNLOADED_DATASETS_PATH"):
        monkeypatch.setattr(library.config, name, str(tmp_path / "home"))


def rows(values: list, features: dict | None = None, column: str = "image", first: int = 0):
    kinds = {column: library.Image()} | ({"label": library.ClassLabel(names=["cat", "dog", "owl"])} if values else {})
    pictures = [{"bytes": image(first + k, "PNG" if k % 2 else "WEBP"), "path": None} for k in range(len(values) or 3)]
    table = {column: pictures} | ({"label": values} if values else {})
    return library.Dataset.from_dict(table, features=library.Features(kinds | (features or {})))


def test_saved_datasets_keep_their_bytes_labels_and_splits(tmp_path, capsys):
    train, test = rows([0, 2, None, -1, 1]), rows([2, 2], first=10)
    library.DatasetDict({"train": train, "test": test}).save_to_disk(tmp_path / "both")
    train.save_to_disk(tmp_path / "one")
    assert convert("huggingface", tmp_path / "both", "--out", tmp_path / "out") == 0
    assert convert("huggingface", tmp_path / "one", "--out", tmp_path / "alone") == 0
    expected = ["cat", "owl", None, None, "dog"]
    assert list(labels(tmp_path / "out/train").values()) == list(labels(tmp_path / "alone").values()) == expected
    made = read_manifest(tmp_path / "out/train")
    assert [read_image(made, k) for k in range(5)] == [image(k, "PNG" if k % 2 else "WEBP") for k in range(5)]
    part = read_manifest(tmp_path / "out/test")  # it lacks two classes, and is counted in the same ones
    assert part.classes == made.classes == ("cat", "dog", "owl")
    assert part.labels.tolist() == [2, 2]
    assert convert("huggingface", tmp_path / "both", "--split", "test", "--out", tmp_path / "test") == 0
    assert read_manifest(tmp_path / "test").hash == part.hash
    (tmp_path / "order").write_text("owl\ndog\nfox\ncat\n")
    order = ["--classes", tmp_path / "order"]
    assert convert("huggingface", tmp_path / "one", "--out", tmp_path / "ordered", *order) == 0
    assert read_manifest(tmp_path / "ordered").labels.tolist() == [3, 0, -1, -1, 1]
    capsys.readouterr()
    assert convert("huggingface", tmp_path / "both", "--split", "dev", "--out", tmp_path / "no") == 2
    assert "has no split 'dev'; it has train, test" in capsys.readouterr().err
    assert convert("huggingface", tmp_path / "both", "--out", tmp_path / "both/shards") == 2


def test_plain_folders_are_read_as_the_library_reads_them(tmp_path, capsys):
    for name, values in (("train", [0, 1, 2, 0]), ("test", [1])):
        (tmp_path / "tables/data").mkdir(parents=True, exist_ok=True)
        rows(values).to_parquet(tmp_path / f"tables/data/{name}-00000-of-00001.parquet")
    assert convert("huggingface", tmp_path / "tables", "--out", tmp_path / "out") == 0
    assert read_manifest(tmp_path / "out/train").labels.tolist() == [0, 1, 2, 0]
    assert read_manifest(tmp_path / "out/test").labels.tolist() == [1]
    assert convert("huggingface", tmp_path / "tables", "--split", "train[1:3]", "--out", tmp_path / "part") == 0
    assert read_manifest(tmp_path / "part").labels.tolist() == [1, 2]
    put(tmp_path / "photos", "cat/a.jpg", "cat/bb.jpg", "dog/cc.jpg")
    assert convert("imagefolder", tmp_path / "photos", "--out", tmp_path / "ours") == 0
    assert convert("huggingface", tmp_path / "photos", "--out", tmp_path / "theirs") == 0
    assert read_manifest(tmp_path / "ours").hash == read_manifest(tmp_path / "theirs").hash  # the same files in both
    put(
        tmp_path / "trap",
        *(f"{part}/{c}/{c}{k}.jpg" for part in ("train", "test") for c in ("cat", "dog") for k in "12"),
    )
    put(tmp_path / "trap", "spare/cat/lost.jpg")
    (tmp_path / "trap/train/notes.txt").write_text("no image")
    capsys.readouterr()
    assert convert("huggingface", tmp_path / "trap", "--out", tmp_path / "trapped") == 0
    text = capsys.readouterr().out  # the library passes both over without a word
    assert "1  image in no row of the dataset: spare/cat/lost.jpg" in text
    assert "1  no image by ending and content: train/notes.txt" in text
    (tmp_path / "photos/dog/cc.jpg").write_bytes(b"\xff\xd8\xff no image")
    assert convert("huggingface", tmp_path / "photos", "--out", tmp_path / "no") == 3
    assert "1 of 3 images cannot be converted" in capsys.readouterr().err


def test_columns_are_found_or_asked_for(tmp_path, capsys):
    rows([]).save_to_disk(tmp_path / "bare")
    assert convert("huggingface", tmp_path / "bare", "--out", tmp_path / "unlabelled") == 0
    assert read_manifest(tmp_path / "unlabelled").classes == ()
    both = {
        "coarse": library.ClassLabel(names=["pet", "bird"]),
        "fine": library.ClassLabel(names=["cat", "dog", "owl"]),
    }
    table = {"picture": [{"bytes": image(k), "path": None} for k in range(3)], "coarse": [0, 0, 1], "fine": [0, 1, 2]}
    made = library.Dataset.from_dict(table, features=library.Features({"picture": library.Image()} | both))
    made.save_to_disk(tmp_path / "two")
    assert convert("huggingface", tmp_path / "two", "--out", tmp_path / "no") == 2
    assert "has 2 columns of classes; it has picture (Image), coarse (ClassLabel), fine (ClassLabel)" in (
        capsys.readouterr().err
    )
    assert convert("huggingface", tmp_path / "two", "--label-column", "coarse", "--out", tmp_path / "coarse") == 0
    assert list(labels(tmp_path / "coarse").values()) == ["pet", "pet", "bird"]
    assert convert("huggingface", tmp_path / "two", "--image-column", "img", "--out", tmp_path / "no") == 2
    names = {"image": [image(k) for k in range(3)], "label": ["b", None, "a"]}  # undeclared bytes and names
    library.Dataset.from_dict(names).save_to_disk(tmp_path / "plain")
    assert convert("huggingface", tmp_path / "plain", "--out", tmp_path / "named") == 0
    assert list(labels(tmp_path / "named").values()) == ["b", None, "a"]
    outside = {"image": [{"bytes": None, "path": "/etc/passwd"}, {"bytes": b"text", "path": None}, None]}
    kinds = library.Features({"image": library.Image()})
    library.Dataset.from_dict(outside, features=kinds).to_parquet(tmp_path / "hostile/train.parquet")
    capsys.readouterr()
    assert convert("huggingface", tmp_path / "hostile", "--out", tmp_path / "no") == 3
    error = capsys.readouterr().err
    assert "3 of 3 images cannot be converted" in error
    assert "its path '/etc/passwd' is no file of the dataset" in error


def test_what_the_library_refuses_is_one_sentence(tmp_path, capsys):
    for name in "ab":
        (tmp_path / "many" / name).mkdir(parents=True)
        rows([0, 1]).to_parquet(tmp_path / f"many/{name}/train.parquet")
    files = "".join(f"- config_name: {name}\n  data_files: {name}/*\n" for name in "ab")
    (tmp_path / "many/README.md").write_text(f"---\nconfigs:\n{files}---\n")
    (tmp_path / "junk").mkdir()
    (tmp_path / "junk/train.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "empty").mkdir()
    cases = {
        ("many",): (2, "available configs: ['a', 'b']; choose with --config"),
        ("many", "--config", "c"): (2, "BuilderConfig 'c' not found"),
        ("many", "--config", "a", "--split", "test"): (2, 'Unknown split "test"'),
        ("junk",): (3, "cannot be read as a dataset"),
        ("empty",): (3, "doesn't contain any data files"),
        ("no/such/folder",): (3, "is no folder, and no name on Hugging Face's hub"),
    }
    for (name, *options), (code, text) in cases.items():
        assert convert("huggingface", tmp_path / name, *options, "--out", tmp_path / "no") == code
        assert text in capsys.readouterr().err.splitlines()[-1]
    assert convert("huggingface", tmp_path / "many", "--config", "b", "--out", tmp_path / "b") == 0


def test_a_cache_of_the_hub_is_enough_without_a_network(tmp_path):
    """The folder is laid out as `hf download` does it; a dataset that is not in it is refused in one sentence."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    cache = tmp_path / "home/hub/datasets--owner--birds"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs/main").write_text(commit)
    (cache / "blobs").mkdir()
    (cache / f"snapshots/{commit}/data").mkdir(parents=True)
    for name, values in (("train", [0, 1, 2]), ("test", [1])):
        rows(values).to_parquet(cache / f"blobs/{name}")
        link = cache / f"snapshots/{commit}/data/{name}-00000-of-00001.parquet"
        link.symlink_to(os.path.relpath(cache / f"blobs/{name}", link.parent))
    code = (
        "import sys; from pipeline.data import main\n"
        "def run(name): return main(['convert', 'huggingface', name, '--out', sys.argv[1] + '/' + name])\n"
        "assert (run('owner/birds'), run('owner/fish')) == (0, 5)"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert read_manifest(tmp_path / "owner/birds/train").labels.tolist() == [0, 1, 2]
    assert read_manifest(tmp_path / "owner/birds/test").classes == ("cat", "dog", "owl")
    assert "owner/fish is no folder here, HF_HUB_OFFLINE is set" in done.stderr
    assert "hf download --repo-type dataset owner/fish" in done.stderr
    assert not (tmp_path / "owner/fish").exists()


class _Hub(http.server.BaseHTTPRequestHandler):
    """A hub that has nothing: a private dataset, and otherwise a server that is too busy."""

    def do_HEAD(self) -> None:
        private = "private" in self.path
        self.send_response(401 if private else 503)
        if private:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *words: object) -> None: ...


def test_a_private_dataset_and_a_busy_hub_are_told_apart(tmp_path):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        code = (
            "import time; time.sleep = lambda seconds: None\n"  # the library waits before it tries again
            "from pipeline.data import main\n"
            "assert [main(['convert', 'huggingface', name, '--out', 'no']) for name in ('o/private', 'o/busy')] == [3, 5]"
        )
        own = {"HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}"}
        environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"} | own
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True
        )
        hub.shutdown()
    assert done.returncode == 0, done.stderr
    private, busy = done.stderr.splitlines()[-2:]
    assert "'o/private' doesn't exist on the Hub or cannot be accessed" in private
    assert "set HF_TOKEN" in private
    assert "o/busy is no folder here, the hub cannot be reached" in busy


def test_without_the_library_the_sentence_says_what_to_install(tmp_path, monkeypatch, capsys):
    pins = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert any(pin.startswith("datasets==") for pin in pins["huggingface"])
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert convert("huggingface", "owner/birds", "--out", tmp_path / "no") == 5
    assert "pip install 'visionmamba-pipeline[huggingface]'" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
