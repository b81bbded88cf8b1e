"""GPUs that were promised and that torch does not see: training never moves to the CPU of a GPU node in silence."""

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.exit_codes import ExitCode
from pipeline.train.gpus import QUIET_BUT_FOR_CUDA, Torch, broken_promise, driver, promise, why_none
from tests.conftest import ENVIRONMENT, ROOT

CPU, CUDA_13, CUDA_12 = Torch("2.13.0+cpu", None), Torch("2.13.0+cu130", "13.0"), Torch("2.13.0+cu126", "12.6")


@pytest.mark.parametrize(
    ("environment", "promised"),
    [
        ({}, ""),
        ({"SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "0"}, ""),
        ({"SLURM_GPUS_ON_NODE": "8"}, "SLURM_GPUS_ON_NODE=8"),
        ({"SLURM_GPUS_PER_NODE": "a100:8"}, "SLURM_GPUS_PER_NODE=a100:8"),
        ({"SLURM_JOB_GPUS": "0"}, "SLURM_JOB_GPUS=0"),  # the GPU number 0, not none
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, ""),
        ({"CUDA_VISIBLE_DEVICES": "", "SLURM_JOB_GPUS": "0,1"}, ""),
        ({"CUDA_VISIBLE_DEVICES": "-1", "SLURM_GPUS_ON_NODE": "8"}, ""),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles", "SLURM_GPUS_ON_NODE": "8"}, "SLURM_GPUS_ON_NODE=8"),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, ""),
    ],
)
def test_who_promises_gpus(environment: dict[str, str], promised: str) -> None:
    assert promise(environment) == promised
    assert bool(broken_promise(CPU, environment)) == bool(promised)


@pytest.mark.parametrize(
    ("build", "version", "words"),
    [
        (CUDA_13, "535.104.05", "CUDA 13.0 needs driver 580 or newer"),
        (CUDA_13, "580.65.06", "the driver is new enough"),
        (CUDA_12, "535.104.05", "the driver is new enough"),
        (CUDA_12, "470.82.01", "CUDA 12.6 needs driver 525 or newer"),
        (CPU, "535.104.05", "torch 2.13.0+cpu is a CPU build; install a CUDA build"),
        (CPU, None, "no driver"),
    ],
)
def test_the_sentence_names_driver_build_and_remedy(build: Torch, version: str | None, words: str) -> None:
    sentence = why_none(build, version)
    assert words in sentence
    assert (f"driver {version}" if version else "no driver") in sentence
    assert build.version in sentence


def test_the_driver_is_read_from_the_kernels_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert driver(tmp_path / "version") is None
    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n"
    )
    assert driver(tmp_path / "version") == "535.104.05"
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 570.86.10\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert driver(tmp_path / "nothing") == "570.86.10"


def test_a_run_ends_with_5_and_a_sentence() -> None:
    code = (
        "import sys; from pipeline.cli import guarded; from pipeline.train import distributed;"
        "sys.exit(guarded(lambda words: distributed.start(60) and 0, []))"
    )
    environment = ENVIRONMENT | {"SLURM_GPUS_ON_NODE": "8"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == ExitCode.ENVIRONMENT, done.stderr
    assert "GPUs were promised (SLURM_GPUS_ON_NODE=8), but torch sees none" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_ranks_hear_torchs_warning_about_the_driver_and_no_other() -> None:
    code = (
        "import warnings; warnings.warn('CUDA initialization: The NVIDIA driver on your system is too old');"
        "warnings.warn('something else')"
    )
    environment = ENVIRONMENT | {"PYTHONWARNINGS": QUIET_BUT_FOR_CUDA}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "too old" in done.stderr
    assert "something else" not in done.stderr
