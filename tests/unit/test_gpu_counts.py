"""The static count of GPU kernels: control flow of a disassembly, and the bounds of the units."""

from collections import Counter

import pytest

from benchmarks import sass
from benchmarks.gpu_counts import clocks
from benchmarks.gpu_static import interpreter_error, scan_bytes
from pipeline.ops.cuda.counted import GPUS, scan_clocks, scan_seconds, sources_hash, table
from pipeline.ops.cuda.program import Program

# A loop over tiles with two alternatives (1 or 3 FFMA), and inside it a loop with one MUFU.
LISTING = """
	.section	.text.kernel,"ax",@progbits
.text.kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/              @!P1 BRA `(.L_x_1) ;
        /*0020*/                   FFMA R0, R0, R0, R0 ;
        /*0040*/                   BRA `(.L_x_2) ;
.L_x_1:
        /*0050*/                   FFMA R0, R0, R0, R0 ;
        /*0060*/               @P2 FFMA R0, R0, R0, R0 ;
        /*0070*/                   FFMA R0, R0, R0, R0 ;
.L_x_2:
        /*0080*/                   MUFU.EX2 R0, R0 ;
        /*0090*/               @P3 BRA `(.L_x_2) ;
        /*00a0*/                   BRA.DIV ~URZ, `(.L_x_3) ;
        /*00b0*/               @P0 BRA `(.L_x_0) ;
        /*00c0*/                   EXIT ;
.L_x_3:
        /*00d0*/                   SHFL.BFLY PT, R0, R0, 0x1, 0x1f ;
        /*00e0*/                   BRA `(.L_x_2) ;
"""


def test_the_heaviest_path_takes_one_alternative_and_repeats_inner_loops():
    blocks = sass.kernels(LISTING, "kern")["kernel"]
    (outer,) = sass.loops(blocks)
    (inner,) = outer.inner
    once = sass.heaviest_path(blocks, outer, {})
    assert (once["FFMA"], once["MUFU.EX2"], once["SHFL.BFLY"]) == (3, 1, 0)
    assert sass.heaviest_path(blocks, outer, {inner.header: 16})["MUFU.EX2"] == 16
    assert sass.kernels(LISTING, "other") == {}


def test_clocks_of_units_follow_from_their_widths():
    operations = Counter({"FFMA": 64, "MUFU.EX2": 64, "LDS.128": 16, "SHFL.BFLY": 8})
    units, shuffles, accesses = clocks(operations, 64, GPUS["a100"])
    assert units["issue"] == pytest.approx(1000 * 152 / 64 / 32 / 4)
    assert units["special functions"] == pytest.approx(1000 / 16)
    assert units["fp32"] == pytest.approx(1000 / 64)
    assert units["shared memory"] == pytest.approx(1000 * (16 * 4 + 8) / 64 / 32)
    assert (shuffles, accesses) == (8 / 64, 16 / 64)


def test_bytes_of_a_layer_are_near_the_least_and_grow_where_the_cache_is_too_small():
    program = Program(source="scan_backward.cu", wide=True, narrow=True, directions=2, taps=4)
    blocks = {"forward": 3, "backward": 2}
    used, least = scan_bytes(program, 197, 768, GPUS["a100"], blocks)
    assert least == pytest.approx(768 * 197 * 2 * 15 + 3 * 2 * 2 * 16 * 197 * 2)  # 15 wide tensors, three times B and C
    assert 1 < used / least < 1.15
    assert (
        scan_bytes(program, 2000, 768, GPUS["a100"], blocks)[0]
        > 1.15 * scan_bytes(program, 2000, 768, GPUS["a100"], blocks)[1]
    )


def test_a_scan_is_charged_for_whole_tiles_and_sixteen_states():
    sizes = {"images": 2, "directions": 2, "channels": 8}
    whole = scan_clocks("forward", "a100", steps=208, states=16, **sizes)
    assert whole == pytest.approx(2 * 2 * 8 * 208 * 16 * table()["sm_80"]["forward"] / 1000)
    assert scan_clocks("forward", "a100", steps=197, states=5, **sizes) == whole


def test_the_table_that_the_plan_reads_was_counted_from_these_kernels():
    """After a change of a kernel: .venv/bin/python -m benchmarks.gpu_static --write."""
    assert table()["sources"] == sources_hash()
    for key, gpu in GPUS.items():
        assert 0 < table()[gpu.arch]["forward"] < table()[gpu.arch]["backward"]
        seconds = scan_seconds("forward", key, images=1, directions=1, channels=1, steps=1000, states=16)
        whole = 1008 * 16 / 1000 * table()[gpu.arch]["forward"]
        assert seconds == pytest.approx(whole / gpu.multiprocessors / gpu.clock)


def test_the_emulated_kernels_equal_the_reference():
    assert interpreter_error() < 1e-5
