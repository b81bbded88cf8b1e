"""Laws of the compiled kernels alone: threads, memory layout, the build and its cache."""

import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.ops import choice
from pipeline.ops.native import build
from tests.unit.ops.implementations import NAMES, operators, outputs_and_gradients, scan_inputs

NATIVE = [name for name in NAMES if name.startswith("native")]


@pytest.mark.parametrize("name", NATIVE)
def test_any_number_of_threads_gives_the_same_bits(name):
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        inputs = scan_inputs(3, 600, 150, 16)  # large enough for several threads
        results.append(outputs_and_gradients(operators(name).scan, inputs))
        results[-1] += outputs_and_gradients(operators(name).conv, [inputs[0], inputs[2][:, None, :4], inputs[5]])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_that_do_nothing_change_no_bit_of_the_others(name, dtype):
    """Few states are computed in half a block; beside states without input or output they fill a whole one."""
    few = scan_inputs(2, 20, 45, 7, channels_last=True)
    u, delta, A, B, C, *rest = (x.to(dtype) if x.dim() == 3 else x for x in few)
    idle = torch.zeros(2, 25, 45, dtype=dtype)
    many = [u, delta, torch.cat([A, -torch.ones(20, 25)], 1), torch.cat([B, idle], 1), torch.cat([C, idle], 1), *rest]
    wanted = outputs_and_gradients(operators(name).scan, [u, delta, A, B, C, *rest])
    found = outputs_and_gradients(operators(name).scan, many)
    for of_states in (3, 4, 5):  # the gradients of A, B and C
        found[of_states] = found[of_states][:, :7]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("name", NATIVE)
def test_outputs_keep_the_layout_of_u(name):
    last = operators(name).scan(*scan_inputs(2, 20, 23, 5, channels_last=True))
    first = operators(name).scan(*scan_inputs(2, 20, 23, 5))
    assert last.transpose(1, 2).is_contiguous()
    assert first.is_contiguous()


def test_without_a_compiler_the_log_has_one_line_and_the_closed_form_runs(monkeypatch, caplog):
    monkeypatch.setattr(choice, "_chosen", {})
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    with caplog.at_level("INFO"):
        assert choice.choose_scan("auto").name == "torch"
    assert "native is not available: no C++ compiler (g++ or clang++) on the PATH" in caplog.text


def test_a_failed_build_is_one_line_and_leaves_nothing_to_load(tmp_path, monkeypatch):
    broken = tmp_path / "broken.cpp"
    broken.write_text("int f() { return no_such_name; }")
    with pytest.raises(build.BuildError, match=r"failed: .*no_such_name") as error:
        build.load_library(cache=tmp_path / "cache", sources=[broken])
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "cache").glob("*.so"))


def test_an_unwritable_cache_is_a_build_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(build.BuildError, match="cannot build in"):
        build.load_library(cache=tmp_path / "file" / "cache")


BUILD_TOGETHER = """
import os, pathlib, sys
from pipeline.ops.native import build

cache, source, count = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), int(sys.argv[3])
children = []
for _ in range(count):
    child = os.fork()
    if child == 0:
        os._exit(build.load_library(cache=cache, sources=[source]).number())
    children.append(child)
print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
"""


@pytest.mark.parametrize("count", [8, pytest.param(64, marks=pytest.mark.soak)])
def test_processes_that_start_together_build_once(tmp_path, count):
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    # This compiler writes one line for each build.
    log, wrapper = tmp_path / "builds", tmp_path / "bin" / "g++"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\n[ "$1" = --version ] || echo build >> {log}\nexec {shutil.which("g++")} "$@"\n')
    wrapper.chmod(wrapper.stat().st_mode | stat.S_IEXEC)
    source = tmp_path / "small.cpp"
    source.write_text('extern "C" int number() { return 42; }')
    environment = {"PATH": f"{wrapper.parent}:/usr/bin:/bin", "HOME": str(tmp_path)}
    command = [sys.executable, "-c", BUILD_TOGETHER, str(tmp_path / "cache"), str(source), str(count)]
    folder = Path(__file__).parents[3]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout == f"{[42] * count}\n"
    assert log.read_text() == "build\n"
    assert len(list((tmp_path / "cache").iterdir())) == 3  # the library, its record and its lock


def _numbers(tmp_path: Path) -> tuple[Path, Path]:
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    source = tmp_path / "small.cpp"
    source.write_text('extern "C" int number() { return 42; }')
    return source, tmp_path / "cache"


def _number_in_a_process(source: Path, cache: Path) -> int:
    """What a process of its own gets from the library; negative if a signal ended it."""
    code = (
        "import sys, pathlib; from pipeline.ops.native import build; cache, source = map(pathlib.Path, sys.argv[1:])\n"
        "sys.exit(build.load_library(cache=cache, sources=[source]).number())"
    )
    folder = Path(__file__).parents[3]
    return subprocess.run([sys.executable, "-c", code, str(cache), str(source)], cwd=folder, check=False).returncode


def _other_library(tmp_path: Path) -> bytes:
    other = tmp_path / "other.cpp"
    other.write_text('extern "C" int number() { __builtin_trap(); }')
    subprocess.run(["g++", "-shared", "-fPIC", str(other), "-o", str(tmp_path / "other.so")], check=True)
    return (tmp_path / "other.so").read_bytes()


@pytest.mark.parametrize("damage", ["truncated", "zeroed", "another library", "no record", "damaged record"])
def test_a_damaged_library_is_built_again_and_ends_no_process(tmp_path, damage):
    source, cache = _numbers(tmp_path)
    assert _number_in_a_process(source, cache) == 42
    (library,), (record,) = cache.glob("*.so"), cache.glob("*.json")
    whole = library.read_bytes()
    if damage == "truncated":
        library.write_bytes(whole[: len(whole) // 2])
    elif damage == "zeroed":
        library.write_bytes(bytes(len(whole)))
    elif damage == "another library":
        library.write_bytes(_other_library(tmp_path))
    elif damage == "no record":
        record.unlink()
        library.write_bytes(b"")
    else:
        record.write_bytes(b"\x00" * 40)
        library.write_bytes(_other_library(tmp_path))
    assert _number_in_a_process(source, cache) == 42
    assert build.sha256_of(library) in record.read_text()


def test_a_library_of_another_cpu_is_built_again(tmp_path, monkeypatch):
    source, cache = _numbers(tmp_path)
    build.load_library(cache=cache, sources=[source])
    monkeypatch.setattr(build, "cpu_fingerprint", lambda: "another")
    build.load_library(cache=cache, sources=[source])
    assert len(list(cache.glob("*.so"))) == 2


def test_without_a_home_the_library_lies_in_a_folder_of_this_user_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    folder = build.cache_folder()
    assert folder.parent == tmp_path
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    with pytest.raises(build.BuildError, match="somebody else"):
        build.cache_folder()
