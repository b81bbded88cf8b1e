"""Our Triton kernels of the scan, with the features that mamba-ssm's kernels lack.

One launch runs both directions, adds them, applies the gate, and blends the ungated outputs. The backward has no
atomics: each block of channels writes its partial sums, which are added in a fixed order, so it is deterministic.

A program owns a batch item and a block of channels and walks time in chunks. Inside a chunk the recurrence is an
associative scan, (a1, b1) then (a2, b2) = (a1 a2, a2 b1 + b2), over a block (channels, steps, states) in registers. The
forward keeps the state at the beginning of each chunk, and the backward recomputes the rest (closed form: spec 4.2).
Masked steps have dt = 0, hence a = 1 and b = 0: the state passes through them unchanged.

This file imports without triton: `compiled` turns its functions into kernels. In the kernels `step` counts in the order
of the scan, and `time` is the index of that step in the tensors.

Shapes in comments: E channels of a block, T steps of a chunk, N states (padded to a power of two).
"""

# Triton types the arguments of a kernel itself.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations  # `tl.constexpr` stays text until Triton reads it

import functools
from typing import Any, NamedTuple

tl: Any = None  # triton.language, set by `compiled`


@functools.cache
def compiled() -> tuple[Any, Any]:
    """Return `scan_forward` and `scan_backward` as kernels.

    Triton looks up the functions that a kernel calls in the kernel's own module, so this replaces them there.
    """
    import triton
    import triton.language

    module = globals()
    module["tl"] = triton.language
    for function in _DEVICE_FUNCTIONS:
        module[function.__name__] = triton.jit(function)
    return module["scan_forward"], module["scan_backward"]


class View(NamedTuple):
    """A (Bt, G, E, L) tensor for a kernel: its data `p`, and the strides of b, g, channel and time in elements."""

    p: Any
    b: int
    g: int
    c: int
    t: int


class Way(NamedTuple):
    """All tensors of one direction: Views, and contiguous (E, N), (E,) and (Bt,) tensors. An absent one is None."""

    u: View
    delta: View
    A: Any
    B: View
    C: View
    D: Any
    bias: Any
    blend: Any
    z: View | None
    carries: Any
    p: View | None = None
    g_p: View | None = None
    g_u: View | None = None
    g_delta: View | None = None
    partials: tuple[Any, ...] | None = None  # partial sums of the gradients of A, B, C, D, bias


def _compose(a1, b1, a2, b2):
    return a1 * a2, a2 * b1 + b2


def _softplus(x):
    # log1p(e) = log(s) e / (s - 1) with s = 1 + e in floating point: the rounding of s cancels (Kahan).
    e = tl.exp(-tl.abs(x))
    s = 1.0 + e
    log1p = tl.where(s == 1.0, e, tl.log(s) * (e / tl.where(s == 1.0, 1.0, s - 1.0)))
    return tl.where(x > 20.0, x, tl.maximum(x, 0.0) + log1p)


def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


def _at(x, b, channel, time):
    """Pointers (E, T) into a View."""
    return x.p + b * x.b + channel[:, None] * x.c + time[None, :] * x.t


def _tile(x, b, channel, time, mask):
    return tl.load(_at(x, b, channel, time), mask=mask, other=0.0).to(tl.float32)


def _states(x, b, g, state, time, mask):
    """Load (T, N) of B or C."""
    at = x.p + b * x.b + g * x.g + state[None, :] * x.c + time[:, None] * x.t
    return tl.load(at, mask=mask, other=0.0).to(tl.float32)


def _step_size(delta, shift, SOFTPLUS: tl.constexpr, mask):
    """Return dt, with 0 at masked steps, so that the state passes through them."""
    dt = delta + shift[:, None]
    if SOFTPLUS:
        dt = _softplus(dt)
    return tl.where(mask, dt, 0.0)


def _place(E_all, G, blocks, E: tl.constexpr):
    """Return this program's batch item, group, block index over all groups, channels (E,), and which of them exist."""
    index = tl.program_id(0) % (G * blocks)
    b, g, block = tl.program_id(0) // (G * blocks), index // blocks, index % blocks
    within = block * E + tl.arange(0, E)
    return b, g, index, g * (E_all // G) + within, within < E_all // G


def _forward_one(
    w, o, L, E_all, N_all, G, blocks,
    REVERSE: tl.constexpr, ADD: tl.constexpr, SOFTPLUS: tl.constexpr, E: tl.constexpr, T: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    b, g, index, channel, inside = _place(E_all, G, blocks, E)
    state, lane = tl.arange(0, N), tl.arange(0, T)
    real = inside[:, None] & (state < N_all)[None, :]
    rates = tl.load(w.A + channel[:, None] * N_all + state[None, :], mask=real, other=0.0)
    shift = tl.zeros((E,), tl.float32)
    if w.bias is not None:
        shift = tl.load(w.bias + channel, mask=inside, other=0.0)
    h = tl.zeros((E, N), tl.float32)
    chunks = tl.cdiv(L, T)
    for k in range(chunks):
        step = k * T + lane
        time = L - 1 - step if REVERSE else step
        mask = inside[:, None] & (step < L)[None, :]
        states_mask = (step < L)[:, None] & (state < N_all)[None, :]
        if w.carries is not None:
            at = w.carries + ((b * G * blocks + index) * chunks + k) * E * N
            tl.store(at + tl.arange(0, E)[:, None] * N + state[None, :], h)
        u = _tile(w.u, b, channel, time, mask)
        dt = _step_size(_tile(w.delta, b, channel, time, mask), shift, SOFTPLUS, mask)
        B = _states(w.B, b, g, state, time, states_mask)
        C = _states(w.C, b, g, state, time, states_mask)
        a = tl.exp(dt[:, :, None] * rates[:, None, :])  # (E, T, N)
        decay, gathered = tl.associative_scan((a, (dt * u)[:, :, None] * B[None, :, :]), 1, _compose)
        hidden = gathered + decay * h[:, None, :]
        p = tl.sum(hidden * C[None, :, :], axis=2)  # (E, T)
        h = tl.sum(tl.where((lane == T - 1)[None, :, None], hidden, 0.0), axis=1)
        out = p
        if w.D is not None:
            out += tl.load(w.D + channel, mask=inside, other=0.0)[:, None] * u
        if w.z is not None:
            z = _tile(w.z, b, channel, time, mask)
            out = out * z * _sigmoid(z)
        if w.blend is not None:
            out += tl.load(w.blend + b) * p
        if ADD:
            out += _tile(o, b, channel, time, mask)
        tl.store(_at(o, b, channel, time), out.to(o.p.dtype.element_ty), mask=mask)
        if w.p is not None:
            tl.store(_at(w.p, b, channel, time), p.to(w.p.p.dtype.element_ty), mask=mask)


def scan_forward(
    first, second, o, L, E_all, N_all, G, blocks, REVERSE_FIRST: tl.constexpr, REVERSE_SECOND: tl.constexpr,
    SOFTPLUS: tl.constexpr, E: tl.constexpr, T: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Compute o, and each direction's p and carries where they are wanted."""
    _forward_one(first, o, L, E_all, N_all, G, blocks, REVERSE_FIRST, False, SOFTPLUS, E, T, N)
    if second is not None:
        tl.debug_barrier()  # the second direction adds to outputs that other threads of this program may have written
        _forward_one(second, o, L, E_all, N_all, G, blocks, REVERSE_SECOND, True, SOFTPLUS, E, T, N)


def _backward_one(
    w, g_o, g_z, L, E_all, N_all, G, blocks,
    REVERSE: tl.constexpr, ADD: tl.constexpr, SOFTPLUS: tl.constexpr, E: tl.constexpr, T: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    b, g, index, channel, inside = _place(E_all, G, blocks, E)
    state, lane = tl.arange(0, N), tl.arange(0, T)
    real = inside[:, None] & (state < N_all)[None, :]
    rates = tl.load(w.A + channel[:, None] * N_all + state[None, :], mask=real, other=0.0)
    shift, skip = tl.zeros((E,), tl.float32), tl.zeros((E,), tl.float32)
    if w.bias is not None:
        shift = tl.load(w.bias + channel, mask=inside, other=0.0)
    if w.D is not None:
        skip = tl.load(w.D + channel, mask=inside, other=0.0)
    passed, g_rates = tl.zeros((E, N), tl.float32), tl.zeros((E, N), tl.float32)  # passed: the later chunk's first lam
    g_shift, g_skip = tl.zeros((E,), tl.float32), tl.zeros((E,), tl.float32)
    chunks = tl.cdiv(L, T)
    for back in range(chunks):
        k = chunks - 1 - back
        step = k * T + lane
        time = L - 1 - step if REVERSE else step
        mask = inside[:, None] & (step < L)[None, :]
        states_mask = (step < L)[:, None] & (state < N_all)[None, :]
        at = w.carries + ((b * G * blocks + index) * chunks + k) * E * N
        h = tl.load(at + tl.arange(0, E)[:, None] * N + state[None, :])
        u = _tile(w.u, b, channel, time, mask)
        delta = _tile(w.delta, b, channel, time, mask)
        dt = _step_size(delta, shift, SOFTPLUS, mask)
        B = _states(w.B, b, g, state, time, states_mask)
        C = _states(w.C, b, g, state, time, states_mask)
        put = (dt * u)[:, :, None] * B[None, :, :]
        a = tl.exp(dt[:, :, None] * rates[:, None, :])
        decay, gathered = tl.associative_scan((a, put), 1, _compose)
        hidden = gathered + decay * h[:, None, :]

        go = _tile(g_o, b, channel, time, mask)
        g_y = go
        if w.z is not None:
            z = _tile(w.z, b, channel, time, mask)
            s = _sigmoid(z)
            g_y = go * z * s
            y = tl.sum(hidden * C[None, :, :], axis=2) + skip[:, None] * u
            gz = go * y * s * (1.0 + z * (1.0 - s))
            if ADD:
                gz += _tile(g_z, b, channel, time, mask)
            tl.store(_at(g_z, b, channel, time), gz.to(g_z.p.dtype.element_ty), mask=mask)
        g_Ch = g_y
        if w.blend is not None:
            g_Ch += tl.load(w.blend + b) * go
        if w.g_p is not None:
            g_Ch += _tile(w.g_p, b, channel, time, mask)

        # lam_t = C_t g_t + a_{t+1} lam_{t+1} needs the decay of the next step, which may lie in the next chunk.
        next_time = time - 1 if REVERSE else time + 1
        next_mask = inside[:, None] & (step + 1 < L)[None, :]
        next_dt = _step_size(_tile(w.delta, b, channel, next_time, next_mask), shift, SOFTPLUS, next_mask)
        next_a = tl.exp(next_dt[:, :, None] * rates[:, None, :])
        through, lam = tl.associative_scan((next_a, g_Ch[:, :, None] * C[None, :, :]), 1, _compose, reverse=True)
        lam += through * passed[:, None, :]
        passed = tl.sum(tl.where((lane == 0)[None, :, None], lam, 0.0), axis=1)

        q = tl.sum(lam * B[None, :, :], axis=2)  # (E, T)
        slope = lam * (hidden - put)  # lam a h_{t-1}, the gradient at dt A
        g_delta = u * q + tl.sum(slope * rates[:, None, :], axis=2)
        if SOFTPLUS:
            raw = delta + shift[:, None]
            g_delta *= tl.where(raw > 20.0, 1.0, _sigmoid(raw))
        g_delta = tl.where(mask, g_delta, 0.0)
        g_u = dt * q + skip[:, None] * g_y
        g_skip += tl.sum(g_y * u, axis=1)
        g_shift += tl.sum(g_delta, axis=1)
        g_rates += tl.sum(slope * dt[:, :, None], axis=1)
        tl.store(_at(w.g_u, b, channel, time), g_u.to(w.g_u.p.dtype.element_ty), mask=mask)
        tl.store(_at(w.g_delta, b, channel, time), g_delta.to(w.g_delta.p.dtype.element_ty), mask=mask)
        row = ((b * G * blocks + index) * L + time)[:, None] * N_all + state[None, :]
        tl.store(w.partials[1] + row, tl.sum(lam * (dt * u)[:, :, None], axis=0), mask=states_mask)
        tl.store(w.partials[2] + row, tl.sum(hidden * g_Ch[:, :, None], axis=0), mask=states_mask)
    own = b * E_all + channel
    tl.store(w.partials[0] + own[:, None] * N_all + state[None, :], g_rates, mask=real)
    tl.store(w.partials[3] + own, g_skip, mask=inside)
    tl.store(w.partials[4] + own, g_shift, mask=inside)


def scan_backward(
    first, second, g_o, g_z, L, E_all, N_all, G, blocks, REVERSE_FIRST: tl.constexpr, REVERSE_SECOND: tl.constexpr,
    SOFTPLUS: tl.constexpr, E: tl.constexpr, T: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of u, delta and z, and the partial sums of the others."""
    _backward_one(first, g_o, g_z, L, E_all, N_all, G, blocks, REVERSE_FIRST, False, SOFTPLUS, E, T, N)
    if second is not None:
        tl.debug_barrier()
        _backward_one(second, g_o, g_z, L, E_all, N_all, G, blocks, REVERSE_SECOND, True, SOFTPLUS, E, T, N)


_DEVICE_FUNCTIONS = (
    _compose,
    _softplus,
    _sigmoid,
    _at,
    _tile,
    _states,
    _step_size,
    _place,
    _forward_one,
    scan_forward,
    _backward_one,
    scan_backward,
)
