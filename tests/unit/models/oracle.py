"""Vim and ARM a second time, from their equations and a checkpoint with the released names, without any code of ours.

It loops over tokens and images in float64, as the papers write it. `side` is the number of patches on a side of a cluster
(None: the scan is row-major).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

State = dict[str, Tensor]
SUFFIXES = ("", "_b", "_c", "_c_b")


def classify(
    state: State, images: Tensor, *, pool: str, side: int | None = None, first: bool = False, divided: bool = True
) -> Tensor:
    """Logits (B, K) of a Vim, or of an ARM in its fine-tuning form.

    `first`: the cls token stands before the patches, not in their middle. `divided`: the directions are averaged.
    """
    return torch.stack([_classify(state, image, pool, side, first, divided) for image in images])


def predict(state: State, images: Tensor, *, side: int | None, group: int, heads: int, taps: Sequence[int]) -> Tensor:
    """Predictions (B, S, P) of an ARM pretraining checkpoint; `group` tokens are predicted at once."""
    return torch.stack([_predict(state, image, side, group, heads, taps) for image in images])


def read_order(rows: int, across: int, side: int | None) -> list[int]:
    """Row-major numbers of the patches, in the order in which they are read."""
    if side is None:
        return list(range(rows * across))
    return [
        (down * side + y) * across + right * side + x
        for down in range(rows // side)
        for right in range(across // side)
        for y in range(side)
        for x in range(side)
    ]


def _classify(w: State, image: Tensor, pool: str, side: int | None, first: bool, divided: bool) -> Tensor:
    tokens, rows, across = _patches(w, image)
    middle = 0 if first else len(tokens) // 2
    position_embedding = torch.cat([w["pos_embed"][0, :middle], w["pos_embed"][0, middle + 1 :]])
    order = read_order(rows, across, side)
    tokens = (tokens + position_embedding)[order]
    cls = w["cls_token"][0, 0] + w["pos_embed"][0, middle]
    x = torch.cat([tokens[:middle], cls[None], tokens[middle:]])
    # The columns of the grid are the rows of its transpose, in the same manner of reading; cls stays in the middle.
    transposed = [(n % rows) * across + n // rows for n in read_order(across, rows, side)]
    down = [order.index(n) for n in transposed]
    down = [n + (n >= middle) for n in down]
    down = [*down[:middle], middle, *down[middle:]]
    straight = list(range(len(x)))
    x = _encode(w, x, [straight, straight[::-1], down, down[::-1]], divided)[-1]
    x = _norm(w, "norm_f", x)
    if pool == "cls":
        x = x[middle]
    elif first:
        x = x[1:].mean(0)
    else:
        x = (x[:middle].mean(0) + x[middle + 1 :].mean(0)) / 2  # both halves alike, as ARM has it
    return w["head.weight"] @ x + w["head.bias"]


def _predict(w: State, image: Tensor, side: int | None, group: int, heads: int, taps: Sequence[int]) -> Tensor:
    tokens, rows, across = _patches(w, image)
    order = read_order(rows, across, side)
    seen = (tokens + w["pos_embed"][0])[order][:-group]
    streams = _encode(w, seen, [list(range(len(seen)))])
    features = torch.cat([_norm(w, f"norm_{k}", streams[tap]) for k, tap in enumerate(taps, start=1)], 1)
    projected = features @ w["enc2dec.weight"].T + w["enc2dec.bias"]
    depth = len({key.split(".")[1] for key in w if key.startswith("dec_block.")})
    width = w["ar_token"].shape[-1]
    q = w["ar_token"][0] + w["dec_pos_embed"][0][order][group:]
    for j in range(depth):
        kv = torch.stack([projected[:, channel * depth + j] for channel in range(width)], 1)
        q = q + _attend(w, f"dec_block.{j}", q, kv, heads, group)
        hidden = _norm(w, f"dec_block.{j}.norm2", q) @ w[f"dec_block.{j}.mlp.fc1.weight"].T
        hidden = hidden + w[f"dec_block.{j}.mlp.fc1.bias"]
        hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
        q = q + hidden @ w[f"dec_block.{j}.mlp.fc2.weight"].T + w[f"dec_block.{j}.mlp.fc2.bias"]
    return _norm(w, "ar_norm", q) @ w["ar_pred.weight"].T + w["ar_pred.bias"]


def _attend(w: State, name: str, q: Tensor, kv: Tensor, heads: int, group: int) -> Tensor:
    queries = _norm(w, f"{name}.norm2_1", q) @ w[f"{name}.attn2.q.weight"].T + w[f"{name}.attn2.q.bias"]
    both = _norm(w, f"{name}.norm2_2", kv) @ w[f"{name}.attn2.kv.weight"].T + w[f"{name}.attn2.kv.bias"]
    width = queries.shape[1]
    keys, values, size = both[:, :width], both[:, width:], width // heads
    out = torch.zeros_like(queries)
    for t in range(len(q)):
        allowed = [s for s in range(len(kv)) if s // group <= t // group]
        for h in range(heads):
            own = slice(h * size, (h + 1) * size)
            weights = torch.softmax(keys[allowed, own] @ queries[t, own] / math.sqrt(size), 0)
            out[t, own] = weights @ values[allowed, own]
    return out @ w[f"{name}.attn2.proj.weight"].T + w[f"{name}.attn2.proj.bias"]


def _patches(w: State, image: Tensor) -> tuple[Tensor, int, int]:
    kernel, bias = w["patch_embed.proj.weight"], w["patch_embed.proj.bias"]
    p = kernel.shape[-1]
    rows, across = image.shape[1] // p, image.shape[2] // p
    tokens = [
        (kernel * image[:, y * p : y * p + p, x * p : x * p + p]).sum((1, 2, 3)) + bias
        for y in range(rows)
        for x in range(across)
    ]
    return torch.stack(tokens), rows, across


def _encode(w: State, x: Tensor, orders: list[list[int]], divided: bool = True) -> list[Tensor]:
    """The stream before the first block and after each."""
    streams = [x]
    for i in range(len({key.split(".")[1] for key in w if key.startswith("layers.")})):
        name = f"layers.{i}"
        first = "norm" if f"{name}.norm.weight" in w else "norm1"
        x = x + _mix(w, f"{name}.mixer", _norm(w, f"{name}.{first}", x), orders, divided)
        if first == "norm1":
            y = _norm(w, f"{name}.norm2", x)
            gate = y @ w[f"{name}.mlp.w1.weight"].T + w[f"{name}.mlp.w1.bias"]
            value = y @ w[f"{name}.mlp.w2.weight"].T + w[f"{name}.mlp.w2.bias"]
            hidden = gate / (1 + torch.exp(-gate)) * value
            x = x + hidden @ w[f"{name}.mlp.w3.weight"].T + w[f"{name}.mlp.w3.bias"]
        streams.append(x)
    return streams


def _norm(w: State, name: str, x: Tensor) -> Tensor:
    """LayerNorm, or RMSNorm where there is no bias."""
    if f"{name}.bias" not in w:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"]
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def _mix(w: State, name: str, x: Tensor, orders: list[list[int]], divided: bool) -> Tensor:
    """Every direction on the tokens in its order, mapped back, averaged or only added."""
    suffixes = [s for s in SUFFIXES if f"{name}.D{s}" in w]
    inner = w[f"{name}.in_proj.weight"].shape[0] // 2
    total = torch.zeros(len(x), inner, dtype=x.dtype)
    for s, order in zip(suffixes, orders, strict=False):
        xz = x[order] @ w[f"{name}.in_proj.weight"].T
        u, z = xz[:, :inner], xz[:, inner:]
        kernel = w[f"{name}.conv1d{s}.weight"][:, 0]
        taps = kernel.shape[1]
        u = torch.stack(
            [
                sum(kernel[:, k] * u[t - taps + 1 + k] for k in range(taps) if t - taps + 1 + k >= 0)
                + w[f"{name}.conv1d{s}.bias"]
                for t in range(len(u))
            ]
        )
        u = u / (1 + torch.exp(-u))
        A = -torch.exp(w[f"{name}.A{s}_log"])
        states, rank = A.shape[1], w[f"{name}.dt_proj{s}.weight"].shape[1]
        h = torch.zeros_like(A)
        for t, place in enumerate(order):
            row = w[f"{name}.x_proj{s}.weight"] @ u[t]
            B, C = row[rank : rank + states], row[rank + states :]
            dt = torch.log1p(torch.exp(w[f"{name}.dt_proj{s}.weight"] @ row[:rank] + w[f"{name}.dt_proj{s}.bias"]))
            h = torch.exp(dt[:, None] * A) * h + dt[:, None] * B * u[t][:, None]
            total[place] += (h @ C + w[f"{name}.D{s}"] * u[t]) * z[t] / (1 + torch.exp(-z[t]))
    return total / (len(suffixes) if divided else 1) @ w[f"{name}.out_proj.weight"].T
