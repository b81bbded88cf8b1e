"""Kill -9 of `convert`, `split`, `report`, exports and conversions of weights, at random moments.

After each kill, what is there is whole or is not taken for whole. After the next start to the end, everything is as if
nothing had been killed: byte for byte, but for the times that a report quotes. A few kills of each in `make test`, more in
`make soak`.
"""

import contextlib
import random
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import torch
from PIL import Image

from pipeline.datasets.manifest import HEADER, read_manifest
from pipeline.exports.export import load_export
from tests import warm
from tests.conftest import Stages
from tests.integration.test_resume import step_reached
from tests.integration.test_soak import gone
from tests.unit.exports.released import checkpoint, filled
from tests.unit.exports.test_convert import SMALL
from tests.waiting import patience, wait_until

FEW_OR_MANY = [pytest.param(2, id="few"), pytest.param(20, id="many", marks=pytest.mark.soak)]


class Command(NamedTuple):
    """A command that is killed.

    Attributes:
        to: Returns its words, for the folder that it writes to.
        check: Looks at what a killed one has left in a folder, beside the folder of one that was not.
    """

    to: Callable[[Path], list[str]]
    check: Callable[[Path, Path], None]


def kill_and_finish(command: Command, folder: Path, kills: int) -> tuple[Path, Path]:
    """Run a command undisturbed into one folder, and killed again and again into another; return both."""
    straight, killed = (folder / name / "out" for name in ("straight", "killed"))  # a page may quote the last name
    begin = time.monotonic()
    assert run(command.to(straight)) == 0
    seconds = time.monotonic() - begin
    seed = int(time.time())
    moments = random.Random(seed)
    print(f"seed of the moments: {seed}, of a command of {seconds:.1f} s")
    for _ in range(kills):
        process = warm.start([sys.executable, "-m", *command.to(killed)])
        end_at(process, time.monotonic() + moments.uniform(0, seconds))
        command.check(killed, straight)
    assert run(command.to(killed)) == 0
    return killed, straight


def end_at(process: warm.Process, moment: float) -> None:
    """Kill a process at a moment, unless it has ended, and see that nothing of it stays."""
    time.sleep(max(0.0, moment - time.monotonic()))
    family: list[int] = []
    with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):  # it may end by itself meanwhile
        family = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
        process.kill()
    process.wait(patience(20))
    assert gone(family), "a killed command left a process behind"
    assert process.returncode in (0, -9), process.errors


def wait_for_the_last_step(process: warm.Process, run_folder: Path, steps: int) -> None:
    def reached() -> bool:
        return step_reached(run_folder) >= steps or process.poll() is not None

    wait_until(reached, "the last step", 60, context=lambda: process.errors)


def run(words: list[str]) -> int:
    done = warm.run([sys.executable, "-m", *words])
    assert done.returncode == 0, done.stderr
    return done.returncode


def contents(folder: Path) -> dict[str, bytes]:
    """Return all files but hidden ones: a temporary file of a killed writer stays until the next one."""
    found = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    return {str(name): path.read_bytes() for name, path in found.items() if not any(p[0] == "." for p in name.parts)}


def whole_files(killed: Path, straight: Path) -> None:
    """Every file that has its final name has its final content."""
    there = contents(killed)
    assert there == {name: content for name, content in contents(straight).items() if name in there}


@pytest.mark.parametrize("kills", FEW_OR_MANY)
def test_a_killed_conversion_continues(tmp_path: Path, kills: int) -> None:
    generator = random.Random(0)
    for k in range(160):
        path = tmp_path / "photos" / f"class{k % 4}" / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.frombytes("RGB", (24, 24), generator.randbytes(24 * 24 * 3)).save(path)

    def words(out: Path) -> list[str]:
        source = ["pipeline.data", "convert", "imagefolder", str(tmp_path / "photos"), "--out", str(out)]
        return [*source, "--samples-per-shard", "20", "--resize", "16", "--processes", "2"]

    def check(killed: Path, straight: Path) -> None:
        if (killed / HEADER).exists():
            assert read_manifest(killed).hash == read_manifest(straight).hash
        shards = {path.name: path.read_bytes() for path in killed.glob("*.tar")}
        assert shards == {name: (straight / name).read_bytes() for name in shards}

    killed, straight = kill_and_finish(Command(words, check), tmp_path, kills)
    assert contents(killed) == contents(straight)


@pytest.mark.parametrize("kills", FEW_OR_MANY)
def test_a_killed_split_is_made_again(tmp_path: Path, digits: Path, kills: int) -> None:
    def words(out: Path) -> list[str]:
        how = "--labelled 0.2 --folds 4 --seed 3".split()
        return ["pipeline.data", "split", str(digits / "train"), "--out", str(out / "split.json"), *how]

    killed, straight = kill_and_finish(Command(words, whole_files), tmp_path, kills)
    assert contents(killed) == contents(straight)
    assert len(contents(killed)) == 5


@pytest.mark.parametrize("kills", FEW_OR_MANY)
def test_a_killed_conversion_of_weights_leaves_nothing_or_an_export(tmp_path: Path, kills: int) -> None:
    torch.save(checkpoint(filled(SMALL["vim"])), tmp_path / "vim.pth")

    def words(out: Path) -> list[str]:
        return ["pipeline.models", "convert", str(tmp_path / "vim.pth"), "--out", str(out)]

    def check(killed: Path, straight: Path) -> None:
        if killed.exists():
            assert contents(killed) == contents(straight)
            shutil.rmtree(killed)  # an export that is there is not written over

    killed, straight = kill_and_finish(Command(words, check), tmp_path, kills)
    assert contents(killed) == contents(straight)


ENDS = {
    "pdf": b"%%EOF",
    "svg": b"</svg>",
    "html": b"</html>",
    "png": b"IEND\xaeB`\x82",
    "csv": b"",
    "md": b"",
    "tex": b"",
}


@pytest.mark.soak
def test_a_killed_report_is_written_again(tmp_path: Path, chain: Stages) -> None:
    def words(out: Path) -> list[str]:
        return ["pipeline.report", str(chain.runs / "smoke"), "--out", str(out / "page.html")]

    def check(killed: Path, straight: Path) -> None:
        for name, content in contents(killed).items():
            assert content.rstrip().endswith(ENDS[name.rpartition(".")[2]]), name

    killed, straight = kill_and_finish(Command(words, check), tmp_path, 4)
    first, second = (
        {
            name: _without_times(content)
            for name, content in contents(folder).items()
            if name.endswith((".csv", ".md", ".html"))
        }
        for folder in (killed, straight)
    )
    assert first == second
    assert contents(killed).keys() == contents(straight).keys()


def _without_times(content: bytes) -> str:
    """Return a text without the seconds that baselines took, which stand alone in their cells."""
    return re.sub(r"(?<=[,>| ])\d+\.\d(?=[\n<| ])", "-", content.decode())


@pytest.mark.parametrize("kills", [1, pytest.param(8, marks=pytest.mark.soak)])
def test_a_run_that_is_killed_while_it_exports_ends_with_the_same_export(chain: Stages, kills: int) -> None:
    moments = random.Random(int(time.time()))
    name = f"exports{kills}"
    run_folder, steps = chain.runs / name / "arm", 8
    command = chain.command("arm", f"run.experiment={name}")
    sound = contents(chain.runs / "smoke" / "arm" / "export")
    for _ in range(kills):
        process = warm.start(command)
        wait_for_the_last_step(process, run_folder, steps)
        end_at(process, time.monotonic() + moments.uniform(0, 1.5))
        if (run_folder / "export").exists():
            load_export(run_folder / "export")
            assert contents(run_folder / "export")["model.safetensors"] == sound["model.safetensors"]
    assert warm.run(command).returncode == 0
    assert contents(run_folder / "export").keys() == sound.keys()
    for file in ("model.safetensors", "fingerprint.safetensors"):
        assert contents(run_folder / "export")[file] == sound[file]
