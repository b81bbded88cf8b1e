"""An export is evaluated by a command: it gives the run's own numbers on any number of processes, or a refusal."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import warm
from tests.conftest import Stages

UNEVEN = "56"  # 400 images in batches of 56 do not divide evenly among one, two or three processes


def evaluate(*arguments: object, nproc: int = 1) -> subprocess.CompletedProcess[str]:
    head = ["-m", "launchers", "evaluate", "--nproc", str(nproc)] if nproc > 1 else ["-m", "pipeline.evaluate"]
    command = [sys.executable, *head, *map(str, arguments)]
    return warm.run(command)


def test_student_and_teacher_get_the_numbers_of_the_run_to_the_last_digit(chain: Stages, tmp_path: Path) -> None:
    run = chain.runs / "smoke" / "semi"
    split = ["--train", chain.digits / "train", "--split", chain.digits / "split.json"]
    done = evaluate(run / "export", chain.digits / "test", *split, "--linear-probe", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    theirs = json.loads((run / "evaluation.json").read_text())["models"]
    ours = json.loads((tmp_path / "evaluation.json").read_text())["models"]
    features = {name: ours[name].pop("features") for name in theirs}
    assert {name: ours[name] for name in theirs} == theirs
    assert all(10 < accuracy <= 100 for found in features.values() for accuracy in found.values())
    assert ours["teacher, calibrated"]["top1"] == theirs["teacher"]["top1"]  # a temperature changes no argmax
    assert ours["teacher, calibrated"]["temperature"] > 0
    assert len((tmp_path / "per_class-student.csv").read_text().splitlines()) == 11


def test_one_two_and_three_processes_write_the_same_bytes(chain: Stages, tmp_path: Path) -> None:
    export, written = chain.runs / "smoke" / "semi" / "export", []
    for nproc in (1, 2, 3):
        out = tmp_path / str(nproc)
        done = evaluate(export, chain.digits / "test", "--batch", UNEVEN, "--out", out, nproc=nproc)
        assert done.returncode == 0, done.stderr
        assert "400 images" in done.stdout
        written.append((out / "evaluation.json").read_bytes())
    assert written[1:] == written[:1] * 2


@pytest.mark.parametrize(
    ("export", "data", "code", "said"),
    [
        ("arm/export", "test", 2, "holds a pretrainer"),
        ("none/export", "test", 4, "no export at"),
        ("semi/export", "nowhere", 3, "there are no shards"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_in_a_sentence(
    chain: Stages, export: str, data: str, code: int, said: str
) -> None:
    done = evaluate(chain.runs / "smoke" / export, chain.digits / data)
    assert done.returncode == code
    assert said in done.stderr
    assert "Traceback" not in done.stderr
