"""An image file classified from the shell, beside files that are none."""

import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import ENVIRONMENT, ROOT, Stages


def predict(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline.predict", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=ENVIRONMENT, check=False)


@pytest.fixture(scope="module")
def export(chain: Stages) -> Path:
    return chain.runs / "smoke" / "semi" / "export"


@pytest.fixture(scope="module")
def digit(chain: Stages, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One test image as a file."""
    path = tmp_path_factory.mktemp("images") / "a digit.png"
    with tarfile.open(next((chain.digits / "test").glob("*.tar"))) as tar:
        member = next(m for m in tar.getmembers() if m.name.endswith(".png"))
        data = tar.extractfile(member)
        assert data is not None
        path.write_bytes(data.read())
    return path


def huge_png(path: Path) -> Path:
    """10,000 x 10,000 black pixels in 12 kB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    side = (10_000).to_bytes(4, "big")
    rows = zlib.compress(bytes(10_000 * 1_251))
    head = chunk(b"IHDR", side * 2 + bytes([1, 0, 0, 0, 0]))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", rows) + chunk(b"IEND", b""))
    return path


def test_the_top_five_come_with_their_shares_and_a_picture_of_where_it_looked(
    export: Path, digit: Path, tmp_path: Path
) -> None:
    done = predict(export, digit, "--cam", tmp_path / "cam")
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    shares = [float(word.rstrip("%")) for word in line.removeprefix(str(digit)).split()[1::2]]
    assert len(shares) == 5
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) <= 100.5
    (picture,) = (tmp_path / "cam").iterdir()
    with Image.open(picture) as image:
        assert image.size == (224, 224)


def test_files_that_are_no_images_get_a_sentence_each_and_the_others_are_classified(
    export: Path, digit: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(digit.read_bytes()[:50])
    pdf = tmp_path / "paper.pdf"
    pdf.write_bytes(b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\ntrailer\n<<>>\n%%EOF\n")
    empty = tmp_path / "empty.jpg"
    empty.touch()
    huge = huge_png(tmp_path / "huge.png")
    bad = [damaged, tmp_path, pdf, empty, huge, tmp_path / "none.png", Path("/dev/null")]
    done = predict(export, *bad, digit, digit)
    assert done.returncode == 3
    assert len(done.stdout.splitlines()) == 2
    sentences = done.stderr.splitlines()
    assert [s.split(": ")[1] for s in sentences] == [str(path) for path in bad]
    assert "100,000,000" in sentences[4] or "10000 x 10000 pixels" in sentences[4]
    assert "a folder" in sentences[1]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["semi/export", "--top", "0"], 2, "at least one name"),
        (["arm/export"], 2, "holds a pretrainer"),
        (["missing"], 4, "no export at"),
    ],
)
def test_a_command_that_makes_no_sense_is_a_sentence(
    chain: Stages, digit: Path, arguments: list[str], code: int, said: str
) -> None:
    folder, *options = arguments
    done = predict(chain.runs / "smoke" / folder, digit, *options)
    assert done.returncode == code
    assert said in done.stderr
