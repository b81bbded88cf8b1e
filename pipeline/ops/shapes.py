"""Checks of the operators' argument shapes; a wrong one is a ValueError in one sentence."""

from collections.abc import Sequence

from torch import Tensor

from pipeline.ops.reference import Direction

MAX_TAPS = 8  # conv.cpp compiles one kernel for each number of taps; Mamba uses 4


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def check_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
) -> None:
    """Raise ValueError unless the arguments of `scan.selective_scan` fit together."""
    if u.dim() != 3 or u.shape[2] == 0 or not u.is_floating_point():
        raise ValueError(f"u must be floating point of shape (batch, channels, steps >= 1), got {_shape(u)} {u.dtype}")
    for name, tensor in (("delta", delta), ("z", z)):
        if tensor is not None and tensor.shape != u.shape:
            raise ValueError(f"{name} must have the shape of u, {_shape(u)}, got {_shape(tensor)}")
    batch, channels, steps = u.shape
    if A.dim() != 2 or A.shape[0] != channels or A.shape[1] == 0:
        raise ValueError(f"A must have shape (channels, states) = ({channels}, N >= 1), got {_shape(A)}")
    states = A.shape[1]
    for name, tensor in (("B", B), ("C", C)):
        plain = tensor.shape == (batch, states, steps)
        grouped = (
            tensor.dim() == 4
            and tensor.shape[1] > 0
            and channels % tensor.shape[1] == 0
            and tensor.shape == (batch, tensor.shape[1], states, steps)
        )
        if not plain and not grouped:
            raise ValueError(
                f"{name} must have shape {(batch, states, steps)}, or {(batch, 'G', states, steps)} with G dividing "
                f"the {channels} channels, got {_shape(tensor)}"
            )
    if B.shape != C.shape:
        raise ValueError(f"B and C must be grouped alike, got {_shape(B)} and {_shape(C)}")
    for name, tensor in (("D", D), ("delta_bias", delta_bias)):
        if tensor is not None and tensor.shape != (channels,):
            raise ValueError(f"{name} must have shape ({channels},), got {_shape(tensor)}")


def check_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise ValueError unless the arguments of `scan.causal_conv1d_silu` fit together."""
    if x.dim() != 3 or x.shape[2] == 0 or not x.is_floating_point():
        raise ValueError(f"x must be floating point of shape (batch, channels, steps >= 1), got {_shape(x)} {x.dtype}")
    channels = x.shape[1]
    if weight.dim() != 3 or weight.shape[:2] != (channels, 1) or not 1 <= weight.shape[2] <= MAX_TAPS:
        raise ValueError(
            f"weight must have shape (channels, 1, taps) = ({channels}, 1, K from 1 to {MAX_TAPS}), got {_shape(weight)}"
        )
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"bias must have shape ({channels},), got {_shape(bias)}")


def check_mixer(xz: Tensor, directions: Sequence[Direction], blend: Tensor | None) -> None:
    """Raise ValueError unless the arguments of `scan.mixer_scan` fit together."""
    if xz.dim() != 3 or xz.shape[1] == 0 or xz.shape[2] % 2 or not xz.is_floating_point():
        raise ValueError(
            f"xz must be floating point of shape (batch, steps >= 1, 2 x channels), got {_shape(xz)} {xz.dtype}"
        )
    if len(directions) not in (1, 2):
        raise ValueError(f"a call takes one or two directions (the second runs backwards), got {len(directions)}")
    channels = xz.shape[2] // 2
    for d in directions:
        check_conv(xz.transpose(1, 2)[:, :channels], d.conv_weight, d.conv_bias)
        per_head = d.A.dim() == 1
        if per_head != (directions[0].A.dim() == 1):
            raise ValueError("the directions of one call must all have A per channel, (E, N), or all per head, (H,)")
        rates = d.A.shape[0] if per_head else channels
        if not (per_head and rates and channels % rates == 0) and (
            d.A.dim() != 2 or 0 in d.A.shape or len(d.A) != channels
        ):
            raise ValueError(
                f"A must have shape (channels, states) = ({channels}, N >= 1), or (H,) with H dividing the channels, "
                f"got {_shape(d.A)}"
            )
        if d.dt_proj.dim() != 2 or d.dt_proj.shape[0] != rates:
            raise ValueError(f"dt_proj must have shape ({rates}, R) as A has {rates} rows, got {_shape(d.dt_proj)}")
        rank = d.dt_proj.shape[1]
        rows = rank + 2 * max(1, (d.x_proj.shape[0] - rank) // 2) if per_head else rank + 2 * d.A.shape[1]
        if d.x_proj.shape != (rows, channels):
            raise ValueError(
                f"x_proj must have shape (R + 2 N, channels) = ({rows}, {channels}), got {_shape(d.x_proj)}"
            )
        for name, tensor in (("D", d.D), ("dt_bias", d.dt_bias)):
            if tensor is not None and tensor.shape != (rates,):
                raise ValueError(f"{name} must have shape ({rates},), got {_shape(tensor)}")
    if blend is not None and blend.shape != (xz.shape[0], len(directions)):
        expected = (xz.shape[0], len(directions))
        raise ValueError(f"blend must have shape (batch, directions) = {expected}, got {_shape(blend)}")
