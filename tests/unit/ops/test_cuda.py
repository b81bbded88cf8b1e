"""The CUDA kernels' own source, run on the CPU by the emulator, equals the reference in value and gradient."""

import ctypes

import pytest
import torch

from pipeline.ops.choice import Operators
from pipeline.ops.cuda.emulator import Emulator, load
from pipeline.ops.cuda.library import CudaLibrary
from pipeline.ops.cuda.program import ConvCall, Program, ScanCall, strided
from pipeline.ops.fused import Fused
from pipeline.ops.native.build import BuildError, find_compiler
from tests.unit.ops import test_mixer as mixers
from tests.unit.ops.implementations import ORACLE, outputs_and_gradients, relative_errors, scan_inputs

try:
    find_compiler()
except BuildError as reason:
    pytest.skip(str(reason), allow_module_level=True)

FUSED = Fused(CudaLibrary(Emulator()))
SPILLED = Fused(CudaLibrary(Emulator(shared_bytes=0)))  # nothing that is movable fits into shared memory


def worst(function, oracle, inputs, **options):
    got = outputs_and_gradients(function, inputs, **options)
    want = outputs_and_gradients(oracle, [None if x is None else x.double() for x in inputs], **options)
    return max(relative_errors(got, want), default=0.0)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("shape", "groups"),
    [((2, 6, 19, 3), None), ((1, 8, 8, 2), 2), ((1, 1, 1, 1), None), ((0, 4, 5, 2), None), ((1, 66, 33, 16), 1)],
)
def test_scan_equals_the_reference_at_odd_shapes(shape, groups, reverse):
    inputs = scan_inputs(*shape, groups=groups, channels_last=reverse)
    assert worst(FUSED.scan, ORACLE.scan, inputs, reverse=reverse, return_ungated=True) < 1e-5


def test_scan_of_more_states_without_gate_skip_bias_and_softplus():
    inputs = scan_inputs(1, 5, 11, 20)
    inputs[1] = inputs[1].abs()  # without the softplus a negative step grows without bound
    inputs[5] = inputs[6] = inputs[7] = None
    assert worst(FUSED.scan, ORACLE.scan, inputs, delta_softplus=False) < 1e-5
    with pytest.raises(ValueError, match="up to 64 states, got 65; choose the scan 'torch'"):
        FUSED.scan(*scan_inputs(1, 5, 11, 65))


# Steps: one tile, an even and an odd number of tiles, in which the directions meet between two tiles or inside one.
@pytest.mark.parametrize(("steps", "channels"), [(5, 6), (30, 33), (47, 70)])
@pytest.mark.parametrize("fused", [FUSED, SPILLED], ids=["shared", "global"])
@pytest.mark.parametrize("count", [1, 2])
def test_mixer_equals_the_reference_with_blend_and_ungated_outputs(monkeypatch, count, fused, steps, channels):
    for name, value in {"BATCH": 2, "STEPS": steps, "CHANNELS": channels, "STATES": 16, "RANK": 2}.items():
        monkeypatch.setattr(mixers, name, value)
    operators = Operators(name="cuda", scan=fused.scan, conv=fused.conv, mixer=fused.mixer)
    blend = torch.rand(2, count)
    got, want = mixers.chain(operators, True, blend), mixers.chain(ORACLE, True, blend)
    assert worst(got, want, mixers.flat_inputs(count)) < 1e-5


def test_bf16_rounds_only_where_a_tensor_is_stored():
    inputs = [x.bfloat16() if i in (0, 1, 3, 4, 6) else x for i, x in enumerate(scan_inputs(1, 40, 37, 16))]
    got = outputs_and_gradients(FUSED.scan, inputs)
    want = outputs_and_gradients(ORACLE.scan, [x.double() for x in inputs])
    assert [g.dtype for g in got[1:]] == [x.dtype for x in inputs]
    assert max(relative_errors(got, want)) < 2**-7


# The tests below use the programs of the first one: a program takes seconds to compile.


def test_wide_tensors_of_two_dtypes_are_computed_in_fp32():
    inputs = scan_inputs(1, 5, 11, 4)
    inputs[0] = inputs[0].bfloat16()
    assert worst(FUSED.scan, ORACLE.scan, inputs, return_ungated=True) < 2**-7


def test_backward_gives_the_same_bits_twice():
    inputs = scan_inputs(2, 40, 37, 16)
    first, second = (outputs_and_gradients(FUSED.scan, inputs, return_ungated=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_nan_stays_in_its_channel_and_later_steps():
    inputs = scan_inputs(1, 4, 9, 2)
    inputs[0][0, 1, 5] = float("nan")
    o, _ = FUSED.scan(*inputs, return_ungated=True)
    assert o.isnan().nonzero().tolist() == [[0, 1, t] for t in range(5, 9)]


def test_batch_items_lie_farther_apart_than_32_bits_count():
    inputs = scan_inputs(2, 4, 9, 2)
    apart = torch.empty(2**31 + 36)  # 8 GiB of addresses, of which two pages are touched
    far = apart.as_strided((2, 4, 9), (2**31, 9, 1))
    far.copy_(inputs[0])
    got, want = (FUSED.scan(u, *inputs[1:], return_ungated=True)[0] for u in (far, inputs[0]))
    assert torch.equal(got, want)
    with pytest.raises(ValueError, match="strides below 2 GiB"):
        strided(apart.as_strided((1, 2, 1), (1, 2**30, 1)))


def test_structures_have_the_sizes_of_the_compiled_ones():
    sizes = {"scan_forward.cu": ScanCall, "scan_backward.cu": ScanCall, "conv.cu": ConvCall}
    for source, structure in sizes.items():
        library = load(Program(source=source, directions=2, taps=4, blend=True, ungated=True))
        assert ctypes.c_int.in_dll(library, "parameter_bytes").value == ctypes.sizeof(structure)
