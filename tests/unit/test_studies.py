"""A failure ends a study with its own exit code, and a study writes only to folders of its own."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import ConfigError
from studies import arm
from studies.runs import run


def test_a_folder_called_digits_is_not_the_bundled_dataset_and_a_split_that_fails_ends_the_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (2, 2, 4, 8, 8, 3), dtype=np.uint8)
    for p, c, k in np.ndindex(2, 2, 4):
        file = tmp_path / "mine" / "digits" / ("train", "test")[p] / f"class{c}" / f"{k}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[p, c, k]).save(file)
    with pytest.raises(SystemExit) as ended:  # 15 a class for validation, of four
        arm.main(["--images", "mine/digits", "--seeds", "0"])
    assert ended.value.code == ConfigError.exit_code
    assert "--validation-per-class 15 is too many for class" in capsys.readouterr().err
    assert (tmp_path / "data/study-arm-digits/test").is_dir()
    assert not (tmp_path / "data/digits").exists()
    assert not (tmp_path / "runs").exists()


def test_a_stage_that_refuses_ends_the_study_with_its_words(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run("arm", "smoke", ["loop.stepz=1"], name="a study's run")
    assert ended.value.code == ConfigError.exit_code
    said = capsys.readouterr().err
    assert said.startswith("a study's run: ")
    assert "did you mean 'steps'?" in said
