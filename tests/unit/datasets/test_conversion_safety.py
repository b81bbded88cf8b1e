"""A conversion that fails, is killed or is started twice leaves nothing that breaks the next one."""

import fcntl
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.data import main
from pipeline.datasets.convert.lock import LOCK
from pipeline.datasets.manifest import read_image, read_manifest
from tests.unit.datasets.sources import convert, image, labels, put


def contents(folder: Path) -> dict[str, bytes]:
    manifest = read_manifest(folder)
    return {manifest.key(i): read_image(manifest, i) for i in range(manifest.num_samples)}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return put(tmp_path / "in", *(f"{c}/{k}.jpg" for c in ("cat", "dog") for k in range(20)))


def test_unreadable_images_are_named_before_anything_is_written_and_mending_helps(source, tmp_path, capsys):
    command = ["imagefolder", source, "--out", tmp_path / "out"]
    (source / "cat/0.jpg").write_bytes(b"")
    (source / "cat/1.jpg").write_bytes(image(1)[:90])
    (source / "dog/2.jpg").write_bytes(b"%!PS\n")
    assert convert(*command) == 3
    error = capsys.readouterr().err
    assert "3 of 40 images cannot be converted, and nothing was written" in error
    assert "cat/0.jpg: the file is empty" in error
    assert "cat/1.jpg: not a readable image" in error
    assert "dog/2.jpg: not a readable image" in error
    assert "--skip-unreadable" in error
    assert not (tmp_path / "out").exists()
    assert convert(*command[:2], "--out", tmp_path / "some", "--skip-unreadable") == 0
    text = capsys.readouterr().out
    assert "37 samples of 2 classes" in text
    assert "1  empty: cat/0.jpg" in text
    assert "2  unreadable: cat/1.jpg, dog/2.jpg" in text
    assert main(["verify", str(tmp_path / "some"), "--processes", "1"]) == 0
    for name in ("cat/0.jpg", "cat/1.jpg"):
        (source / name).write_bytes(image(3))
    (source / "dog/2.jpg").unlink()
    assert convert(*command) == 0
    assert read_manifest(tmp_path / "out").num_samples == 39


def test_names_that_no_shard_can_hold(source, tmp_path, capsys):
    os.rename(source / "cat/0.jpg", source / "cat/set1\\0.jpg")
    os.rename(os.fsencode(source / "dog/0.jpg"), os.fsencode(source / "dog") + b"/caf\xe9.jpg")
    assert convert("imagefolder", source, "--out", tmp_path / "out") == 3
    error = capsys.readouterr().err
    assert "1 of 40 images cannot be converted" in error
    assert "cat/set1\\0.jpg: a name cannot hold a backslash" in error
    assert convert("imagefolder", source, "--out", tmp_path / "out", "--skip-unreadable") == 0
    assert "dog/caf%E9" in labels(tmp_path / "out")
    assert main(["verify", str(tmp_path / "out"), "--processes", "1"]) == 0
    (source / "dog/7_jpg").write_bytes(image(1, "PNG"))
    (source / "dog/7.png").write_bytes(image(2, "PNG"))
    assert convert("imagefolder", source, "--out", tmp_path / "two") == 3
    assert "dog/7.jpg and dog/7_jpg would both be sample 'dog/7_jpg'" in capsys.readouterr().err
    os.rename(os.fsencode(source / "dog") + b"/caf\xe9.jpg", os.fsencode(source / "dog") + b"/\xe9.txt")
    os.truncate(os.fsencode(source / "dog") + b"/\xe9.txt", 0)
    (source / "dog/7_jpg").unlink()
    (source / "dog/7.png").unlink()
    assert convert("imagefolder", source, "--out", tmp_path / "two", "--skip-unreadable") == 0
    assert "no image by ending and content: dog/\\xe9.txt" in capsys.readouterr().out


def test_out_inside_the_source_or_where_nothing_can_be_written_is_one_sentence(source, tmp_path, capsys):
    for kind, out in (("imagefolder", source / "cat" / "shards"), ("folder", source), ("imagefolder", source)):
        assert convert(kind, source, "--out", out) == 2
        assert "is inside the source" in capsys.readouterr().err
    pool = put(tmp_path / "pool", "x.jpg")
    assert convert("imagefolder", source, "--unlabelled", pool, "--out", pool / "out") == 2
    assert sorted(path.name for path in source.iterdir()) == ["cat", "dog"]
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/no")):
        assert convert("imagefolder", source, "--out", out) == 5
        assert "Traceback" not in capsys.readouterr().err
    assert convert("imagefolder", source, "--out", tmp_path / "o") == 0
    assert main(["split", str(tmp_path / "o"), "--out", "/proc/no/s"]) == 5


def test_two_conversions_into_one_folder_exclude_each_other(source, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    with open(out / LOCK, "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert convert("imagefolder", source, "--out", out) == 5
        assert "another process is converting into" in capsys.readouterr().err
        assert [path.name for path in out.iterdir()] == [LOCK]
    assert convert("imagefolder", source, "--out", out) == 0
    assert not (out / LOCK).exists()


def begun(source: Path, out: Path, processes: int = 2) -> "subprocess.Popen[bytes]":
    """Start a conversion; return when it has written a shard."""
    options = ["--out", str(out), "--samples-per-shard", "2", "--processes", str(processes)]
    process = subprocess.Popen([sys.executable, "-m", "pipeline.data", "convert", "imagefolder", str(source), *options])
    deadline = time.monotonic() + 60
    while len(list(out.glob("*.tar"))) < 2:
        assert process.poll() is None, "the conversion ended before it was stopped"
        assert time.monotonic() < deadline, "no shard in 60 s"
        time.sleep(0.001)
    return process


def children(pid: int) -> list[int]:
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    return [int(line) for line in listed.stdout.split()]


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture
def large(tmp_path: Path) -> Path:
    return put(tmp_path / "large", *(f"{c}/{k}.jpg" for c in ("cat", "dog") for k in range(100)))


def test_workers_die_with_the_conversion_and_the_next_start_goes_on(large, tmp_path):
    process = begun(large, tmp_path / "out")
    workers = children(process.pid)
    assert len(workers) == 2
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    deadline = time.monotonic() + 10
    while any(map(running, workers)):
        assert time.monotonic() < deadline, "workers outlive a killed conversion"
        time.sleep(0.01)
    options = ["--samples-per-shard", "2"]
    assert convert("imagefolder", large, "--out", tmp_path / "out", *options) == 0
    assert convert("imagefolder", large, "--out", tmp_path / "straight", *options) == 0
    ours, straight = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("out", "straight"))
    assert ours == straight


@pytest.mark.parametrize("restored", [False, True], ids=["new time", "restored time"])
def test_a_conversion_continued_over_a_changed_source_notices(large, tmp_path, caplog, restored):
    process = begun(large, tmp_path / "out", 1)
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    first = read_first_member(tmp_path / "out" / "000000.tar")
    before = (large / first).stat()
    (large / first).write_bytes(image(77))
    if restored:
        os.utime(large / first, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert convert("imagefolder", large, "--out", tmp_path / "out", "--samples-per-shard", "2") == 0
    assert "1 shards are written again" in caplog.text
    assert contents(tmp_path / "out")[first.removesuffix(".jpg")] == image(77)
    (large / first).write_bytes(image(78) + b"\0")
    assert convert("imagefolder", large, "--out", tmp_path / "out", "--samples-per-shard", "2") == 3


def read_first_member(path: Path) -> str:
    import tarfile

    with tarfile.open(path) as tar:
        return next(name for name in tar.getnames() if name.endswith(".jpg"))


def test_a_file_that_changes_meanwhile_or_another_source_is_refused(source, tmp_path, capsys):
    out = tmp_path / "out"
    process = begun(put(tmp_path / "more", *(f"{c}/{k}.jpg" for c in "ab" for k in range(100))), out, 1)
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    assert convert("imagefolder", source, "--out", out) == 3
    assert "holds another conversion" in capsys.readouterr().err
    for damage in (b"", b"{", b"[]", b"\xff"):
        (out / "convert.json").write_bytes(damage)
        assert convert("imagefolder", source, "--out", out) == 3
        assert "is damaged or of another version" in capsys.readouterr().err
    for path in out.glob("*.tar"):
        path.unlink()
    assert convert("imagefolder", source, "--out", out) == 0  # a damaged record beside no shards blocks nothing


@pytest.mark.parametrize("limit", [0, 10, 9000])
def test_a_full_disk_is_one_sentence_and_the_next_start_works(source, tmp_path, limit):
    command = [
        sys.executable,
        "-m",
        "pipeline.data",
        "convert",
        "imagefolder",
        str(source),
        "--out",
        str(tmp_path / "out"),
    ]
    command += ["--processes", "2", "--samples-per-shard", "10"]
    full = subprocess.run(
        command,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        check=False,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert full.returncode == 5, full.stderr
    assert "Traceback" not in full.stderr
    assert full.stderr.startswith("error: ")
    assert convert("imagefolder", source, "--out", tmp_path / "out", "--samples-per-shard", "10") == 0
    assert main(["verify", str(tmp_path / "out"), "--processes", "1"]) == 0


def test_a_link_to_itself_is_no_folder_and_is_named(source, tmp_path, capsys):
    (tmp_path / "loop").symlink_to("loop")
    assert convert("folder", tmp_path / "loop", "--out", tmp_path / "out") == 3
    assert "is not a folder" in capsys.readouterr().err
    assert convert("folder", source, "--out", tmp_path / "loop/out") == 5
    (source / "cat/loop").symlink_to("loop")
    unlabelled = put(tmp_path / "more", "x.jpg")
    assert convert("imagefolder", source, "--unlabelled", unlabelled, "--out", tmp_path / "out") in (0, 3)
    assert "Traceback" not in capsys.readouterr().err
