"""The CUDA kernels as a `pipeline.ops.kernels.Kernels`: memory, launches, and the sums over partial results.

A backward writes the gradients of A, B, C, D and the biases as partial sums, one for each block or batch item; torch adds
them. No kernel uses atomics, so all results are deterministic.

Bt batch, E channels, L steps, N states, G groups, K taps.
"""

from collections.abc import Sequence
from ctypes import Structure
from typing import Any, Protocol

import torch
from torch import Tensor

from pipeline.ops.cuda.program import ConvCall, Program, ScanCall, pointer, strided
from pipeline.ops.kernels import Filter, ScanInputs, ScanProblem
from pipeline.ops.projections import TorchProjections

MOST_STATES = 64  # four lanes with 16 states each
MOST_TILES = 8  # tiles of channels of a block in the backward: its partial sums of B and C are as many times smaller
CONV_CHANNELS, CONV_STEPS = 32, 64  # what one block computes


class Device(Protocol):
    """Where kernels run: a GPU (`driver.py`), or the CPU in its place (`emulator.py`)."""

    def shared_bytes(self, device: torch.device) -> int:
        """Return the shared memory of a block, of which two run on a multiprocessor."""

    def resident_blocks(self, device: torch.device) -> int:
        """Return how many blocks of the backward run at a time."""

    def launch(
        self, program: Program, kernel: str, call: Structure, blocks: int, shared_bytes: int, device: torch.device
    ) -> None:
        """Run a kernel of a program on the current stream."""


class CudaLibrary(TorchProjections):
    """The CUDA kernels.

    Args:
        device: Where they run.
    """

    fuses_convolution = True

    def __init__(self, device: Device) -> None:
        self._device = device

    def scan_forward(
        self, problem: ScanProblem, *, ungated: bool, keep: bool
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Implement `Kernels.scan_forward`. Nothing is kept: the backward computes the states again from the inputs."""
        problem = _one_dtype(problem)
        u = problem.inputs[0].u
        o = torch.empty_like(u)
        ps = [torch.empty_like(u) for _ in problem.inputs if ungated]
        if u.numel():
            program = _program("scan_forward.cu", problem, ungated)
            call = _scan_call(problem, program)
            call.o = strided(o)
            for direction, p in zip(call.direction, ps, strict=False):
                direction.p = strided(p)
            self._launch_scan(program, "scan_forward", call, program.forward_bytes(call.steps), u.device)
        return o, ps, []

    def scan_backward(
        self,
        problem: ScanProblem,
        carries: Sequence[Tensor],
        g_o: Tensor,
        g_ps: Sequence[Tensor],
        g_z: Tensor | None,
    ) -> list[ScanInputs]:
        """Implement `Kernels.scan_backward`."""
        problem, given = _one_dtype(problem), problem
        inputs = problem.inputs
        u = inputs[0].u
        g_o, g_ps = g_o.to(u.dtype), [g_p.to(u.dtype) for g_p in g_ps]
        g_gate = None if g_z is None else g_z if g_z.dtype == u.dtype else torch.empty_like(g_z, dtype=u.dtype)
        batch, channels, steps = u.shape
        states, groups = inputs[0].A.shape[1], _groups(problem)
        program = _program("scan_backward.cu", problem, bool(g_ps))
        call = _scan_call(problem, program)
        tiles = call.blocks
        call.tiles = self._tiles_of_block(batch * groups, tiles, u.device)
        call.blocks = -(-tiles // call.tiles)
        call.g_o, call.g_z = strided(g_o), strided(g_gate)

        def floats(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device=u.device)

        partial_BC = floats(batch, groups, call.blocks, len(inputs), steps, 2, states)
        call.partial_BC = partial_BC.data_ptr()
        # One tensor holds both directions: a sum over it costs the host less than one sum per direction.
        partial_A, partial_D_bias = (
            floats(len(inputs), batch, channels, states),
            floats(2, len(inputs), batch, channels),
        )
        wide = []
        for k, direction in enumerate(call.direction[: len(inputs)]):
            wide.append((torch.empty_like(u), torch.empty_like(inputs[k].delta)))
            direction.g_u, direction.g_delta = map(strided, wide[k])
            direction.partial_A = partial_A[k].data_ptr()
            direction.partial_D, direction.partial_bias = (each[k].data_ptr() for each in partial_D_bias)
            direction.g_p = strided(g_ps[k] if g_ps else None)
        if u.numel():
            self._launch_scan(program, "scan_backward", call, program.backward_bytes(steps), u.device)
        if g_z is not None and g_gate is not g_z and g_gate is not None:
            g_z.copy_(g_gate)

        g_BC = partial_BC.sum(2).permute(2, 4, 0, 1, 5, 3)  # (directions, B or C, Bt, G, N, L)
        g_A, (g_D, g_bias) = partial_A.sum(1), partial_D_bias.sum(2)
        results = []
        for k, (g_u, g_delta) in enumerate(wide):
            shape = given.inputs[k].B.shape
            results.append(
                ScanInputs(
                    g_u,
                    g_delta,
                    g_A[k],
                    g_BC[k, 0].reshape(shape),
                    g_BC[k, 1].reshape(shape),
                    None if inputs[k].D is None else g_D[k],
                    None if inputs[k].bias is None else g_bias[k],
                )
            )
        return results

    def conv_forward(self, x: Tensor, filters: Sequence[Filter], reverses: Sequence[bool]) -> list[Tensor]:
        """Implement `Kernels.conv_forward`."""
        outs = [torch.empty_like(x) for _ in filters]
        if x.numel():
            program, call = _conv_call(x, filters, reverses)
            for filter_, out in zip(call.filter, outs, strict=False):
                filter_.out = strided(out)
            call.step_blocks = -(-call.steps // CONV_STEPS)
            blocks = call.batch * call.blocks * call.step_blocks
            self._device.launch(program, "conv_forward", call, blocks, 0, x.device)
        return outs

    def conv_backward(
        self, x: Tensor, filters: Sequence[Filter], reverses: Sequence[bool], g_outs: Sequence[Tensor], g_x: Tensor
    ) -> list[Filter]:
        """Implement `Kernels.conv_backward`."""
        program, call = _conv_call(x, filters, reverses)
        call.g_x = strided(g_x)
        g_outs = [g_out.to(x.dtype) for g_out in g_outs]
        sizes = len(filters), x.shape[0], x.shape[1]
        partial_weights, partial_biases = (
            torch.empty(shape, dtype=torch.float32, device=x.device) for shape in ((*sizes, program.taps), sizes)
        )
        for filter_, g_out, weight, bias in zip(call.filter, g_outs, partial_weights, partial_biases, strict=False):
            filter_.g_out = strided(g_out)
            filter_.partial_weight, filter_.partial_bias = weight.data_ptr(), bias.data_ptr()
        if x.numel():
            self._device.launch(program, "conv_backward", call, call.batch * call.blocks, 4 * 256, x.device)
        sums = zip(filters, partial_weights.sum(1), partial_biases.sum(1), strict=True)
        return [
            (g_weight.view(weight.shape), None if bias is None else g_bias) for (weight, bias), g_weight, g_bias in sums
        ]

    def _launch_scan(
        self, program: Program, kernel: str, call: ScanCall, shared: tuple[int, int], device: torch.device
    ) -> None:
        always, movable = shared
        blocks = call.batch * call.groups * call.blocks
        scratch = None
        if always + movable > self._device.shared_bytes(device):
            scratch = torch.empty(blocks * movable // 4, dtype=torch.float32, device=device)
            call.scratch, movable = scratch.data_ptr(), 0
        self._device.launch(program, kernel, call, blocks, always + movable, device)

    def _tiles_of_block(self, outer: int, tiles: int, device: torch.device) -> int:
        """Return how many tiles of channels each block computes: as many as leave all multiprocessors at work."""
        resident = self._device.resident_blocks(device)

        def rounds(each: int) -> int:
            return -(-outer * -(-tiles // each) // resident) * each

        best = min(map(rounds, range(1, MOST_TILES + 1)))
        return max(each for each in range(1, min(MOST_TILES, tiles) + 1) if each == 1 or rounds(each) <= 1.1 * best)


def _groups(problem: ScanProblem) -> int:
    B = problem.inputs[0].B
    return B.shape[1] if B.dim() == 4 else 1


def _one_dtype(problem: ScanProblem) -> ScanProblem:
    """Give the wide tensors one dtype, and B and C one; a kernel is compiled for one of each."""
    wide = {t.dtype for given in problem.inputs for t in (given.u, given.delta)}
    wide |= set() if problem.z is None else {problem.z.dtype}
    narrow = {t.dtype for given in problem.inputs for t in (given.B, given.C)}
    if len(wide) == len(narrow) == 1:
        return problem
    to_wide = wide.pop() if len(wide) == 1 else torch.float32
    to_narrow = narrow.pop() if len(narrow) == 1 else torch.float32
    inputs = [
        given._replace(
            u=given.u.to(to_wide), delta=given.delta.to(to_wide), B=given.B.to(to_narrow), C=given.C.to(to_narrow)
        )
        for given in problem.inputs
    ]
    z = None if problem.z is None else problem.z.to(to_wide)
    return ScanProblem(
        inputs=inputs,
        reverses=problem.reverses,
        z=z,
        blend=problem.blend,
        softplus=problem.softplus,
        filters=problem.filters,
    )


def _program(source: str, problem: ScanProblem, ungated: bool) -> Program:
    first = problem.inputs[0]
    states = first.A.shape[1]
    if states > MOST_STATES:
        raise ValueError(f"the CUDA kernels take up to {MOST_STATES} states, got {states}; choose the scan 'torch'")
    return Program(
        source=source,
        wide=first.u.dtype == torch.bfloat16,
        narrow=first.B.dtype == torch.bfloat16,
        directions=len(problem.inputs),
        lane_states=4 if states <= 16 else 8 if states <= 32 else 16,
        taps=problem.filters[0][0].shape[2] if problem.filters else 0,
        softplus=problem.softplus,
        gate=problem.z is not None,
        blend=problem.blend is not None,
        ungated=ungated,
    )


def _scan_call(problem: ScanProblem, program: Program) -> ScanCall:
    first = problem.inputs[0]
    batch, channels, steps = first.u.shape
    groups = _groups(problem)
    blocks = -(-channels // (groups * program.block_channels))
    call = ScanCall(batch, groups, channels, first.A.shape[1], steps, blocks)
    call.z = strided(problem.z)
    for k, (given, reverse) in enumerate(zip(problem.inputs, problem.reverses, strict=True)):
        direction = call.direction[k]
        direction.u, direction.delta, direction.B, direction.C = map(strided, (given.u, given.delta, given.B, given.C))
        direction.A, direction.D, direction.bias = map(pointer, (given.A, given.D, given.bias))
        direction.blend = pointer(None if problem.blend is None else problem.blend[k])
        direction.reversed = reverse
        if problem.filters:
            direction.conv_weight, direction.conv_bias = map(pointer, problem.filters[k])
    return call


def _conv_call(x: Tensor, filters: Sequence[Filter], reverses: Sequence[bool]) -> tuple[Program, Any]:
    program = Program(
        source="conv.cu", wide=x.dtype == torch.bfloat16, directions=len(filters), taps=filters[0][0].shape[2]
    )
    call = ConvCall(x.shape[0], x.shape[1], x.shape[2], -(-x.shape[1] // CONV_CHANNELS))
    call.x = strided(x)
    for filter_, (weight, bias), reverse in zip(call.filter, filters, reverses, strict=False):
        filter_.weight, filter_.bias, filter_.reversed = pointer(weight), pointer(bias), reverse
    return program, call
