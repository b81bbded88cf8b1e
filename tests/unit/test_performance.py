"""The page of all figures: what it says of each run, which runs it shows, and that `python -m benchmarks` continues."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__ as bench
from benchmarks import machine, performance
from benchmarks.turns import LEAST, medians


def record(
    name: str, value: float, *, others: float = 0.0, processor: str = "A, 2 cores", **more: Any
) -> dict[str, Any]:
    known = {"name": name, "processor": processor, "instructions": "AVX2", "commit": "abc", "date": "2026-11-25"}
    return (
        known
        | {"command": f"python -m benchmarks.{name}", "seconds": 3, "others": others}
        | {"figures": {"ratio": value, "absent": None, **more}}
    )


def test_a_machine_s_quiet_run_stays_and_other_machines_stand_beside_it() -> None:
    quiet, noisy, elsewhere = record("scan", 1.5), record("scan", 9.0, others=0.4), record("scan", 2.5, processor="B")
    found = performance.newest([quiet, elsewhere, noisy])
    assert found == [elsewhere, quiet]  # the newest first
    text = performance.page(found, picture=False)
    assert "| `ratio` | 2.5 | 1.5 |" in text
    assert "| `absent` | - | - |" in text
    assert "2. A, 2 cores, AVX2; 2026-11-25, commit `abc`, 3 s; quiet: `python -m benchmarks.scan`" in text
    assert performance.newest([noisy, quiet]) == performance.newest([quiet]) == [quiet]
    assert "NOT quiet: others used 40% of the processor" in performance.page([noisy], picture=False)


def test_a_page_without_records_says_so() -> None:
    assert "No figure has been taken yet" in performance.page([], picture=False)
    assert "No figure has been taken yet" not in performance.page([record("scan", 1.5)], picture=False)


def test_every_benchmark_of_the_command_has_a_sentence_and_prints_json() -> None:
    for module, *_ in bench.COMMANDS.values():
        assert len(performance._summary(f"python -m {module}")) > 15
        assert "json.dumps" in (performance.ROOT / f"{module.replace('.', '/')}.py").read_text()


def test_the_page_in_docs_is_made_from_the_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = performance.PAGE.read_text()
    monkeypatch.setattr(performance, "PAGE", tmp_path / "docs" / "performance.md")
    (tmp_path / "docs" / "images").mkdir(parents=True)
    assert performance.write_page().read_text() == written


def test_the_command_takes_what_is_missing_and_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that fails is named; the next call takes only what has no record of this commit."""
    started: list[str] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        started.append(command[2])
        if command[2] == "benchmarks.scan" and len(started) == 2:
            raise subprocess.CalledProcessError(1, command)
        return subprocess.CompletedProcess(command, 0, stdout='words\n{"ratio": 2.0}\n')

    monkeypatch.setattr(performance, "RECORDS", tmp_path / "performance.jsonl")
    monkeypatch.setattr(performance, "PAGE", tmp_path / "performance.md")
    monkeypatch.setattr(
        bench, "COMMANDS", {"several": ["benchmarks.several"], "scan": ["benchmarks.scan", "--rounds=3"]}
    )
    monkeypatch.setattr(bench, "_commit", lambda: "abc")
    monkeypatch.setattr(bench.subprocess, "run", run)
    assert bench.main([]) == 2
    assert [r["name"] for r in performance.records()] == ["several"]
    assert bench.main([]) == 0
    assert started == ["benchmarks.several", "benchmarks.scan", "benchmarks.scan"]
    assert [r["figures"] for r in performance.records()] == [{"ratio": 2.0}] * 2
    assert bench.main(["several", "--again"]) == 0
    assert len(performance.records()) == 3
    assert bench.main(["three"]) == 2


def test_one_switch_narrows_the_instructions_of_torch_and_of_our_kernels() -> None:
    if machine.instructions() == "baseline":
        pytest.skip("this processor has no AVX2")
    code = "from pipeline.ops.native.build import best_simd; from benchmarks import machine; import json;"
    code += "print(json.dumps([best_simd(), machine.instructions(), machine.multiplies_bf16()]))"
    environment = {"PATH": "/usr/bin:/bin", **machine.NARROWER["avx2"]}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(found.stdout) == ["avx2", "AVX2", False]


def test_turns_end_when_their_time_is_over() -> None:
    calls: list[str] = []
    medians({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 1000, budget=0.0)
    assert calls == ["a", "b"] + ["a", "b"] * LEAST
