"""What the doctor concludes from what the ranks saw on their nodes."""

import stat
from pathlib import Path

import pytest

from launchers import node_check
from launchers.node_check import findings, slow_ones, told_by_driver, wrong_with


def seen(node: str, speed: float = 100.0, gpu: str = "", problems: tuple[str, ...] = ()) -> dict[str, object]:
    return {"node": node, "problems": list(problems), "speed": speed, "gpu": gpu, "shared_gb": 64.0}


def test_one_slow_gpu_is_named_and_ordinary_differences_are_not() -> None:
    assert slow_ones([100, 98, 101, 96, 85]) == [4]
    everyone = [seen("a", 100, "A100"), seen("a", 97, "A100"), seen("b", 99, "A100"), seen("b", 60, "A100")]
    lines = findings(everyone, "", "nccl")
    assert lines[0] == ["4 ranks on a, b sum a tensor over nccl", ""]
    assert [what for what, remedy in lines if remedy] == ["speed of rank 3 on b"]


def test_cpus_are_not_compared_and_problems_are_told_once() -> None:
    lines = findings([seen("a", 100, problems=("full",)), seen("a", 10, problems=("full",))], "timed out", "gloo")
    assert [remedy for _, remedy in lines if remedy] == ["timed out; NCCL_DEBUG=INFO says more", "full"]


def test_what_nvidia_smi_says_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the program: there is no GPU here."""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho '3, 210, 1410, Active, 91'\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    found = told_by_driver(0)
    assert (found["clocks.sm"], found["clocks.max.sm"]) == ("210", "1410")
    ecc, slowed = wrong_with(found)
    assert "3 uncorrected ECC errors" in ecc
    assert "slows it down at 91 C" in slowed
    program.write_text("#!/bin/sh\necho '[N/A], 1410, 1410, Not Active, 35'\n")
    assert wrong_with(told_by_driver(0)) == []
    program.write_text("#!/bin/sh\nexit 9\n")
    assert told_by_driver(0) == {}
    assert node_check.wrong_with({}) == []
