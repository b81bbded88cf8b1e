"""The page about a GPU that `make gpu-check` writes: docs/gpu/DEVICE.md from DEVICE.json."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.gpu_models import MODELS, SIZES
from benchmarks.gpu_runs import BOUNDS
from benchmarks.gpu_scan import SHAPES
from pipeline.ops.choice import RIVALS

_SCAN = """One direction of a scan in bf16, milliseconds; a training pass is forward and backward. `cuda` are this project's
kernels, in the memory layout that each implementation is made for. (images, channels, steps, states) stand under the name."""
_MODELS = """Milliseconds of a batch in bf16: Vision Mamba small beside timm's ViT small, which has fused attention."""
_WAITS = """Calls per step between two log lines for which the host waits, in a profile of stage 1. One
`cudaDeviceSynchronize` in five steps is the profiler's own."""
_LOSSES = """The demo's stages, 30 steps each: differences of the losses between ZeRO 0, 1 and 2, by Muon 0 and 2, as shares
of the loss. At most {fp32:.0e} in fp32 and {bf16:.0e} in bf16 are allowed on average. In stage 3 a rounding can move a
pseudo-label across the threshold, which shows in single steps."""
_RECIPES = """20 steps of each recipe on photographs made on the spot, one micro-batch a step on one GPU. Planned are the least
and the likely seconds of a step (`python -m launchers plan`), and the memory. MFU is the share of the peak FLOP/s; waiting is the
share of the time that the loop waited for images."""

_TOLD = {"date": "on", "torch": "torch", "cuda": "CUDA", "driver": "driver", "gpus": "GPUs"}

Values = Mapping[str, Any]


def page(values: Values) -> str:
    """Return the page in Markdown.

    Args:
        values: The JSON object of a device: what the parts of `benchmarks.gpu_check` return, `device` and `failed`.
    """
    failed = "".join(f"- {name}: {sentence}\n" for name, sentence in values["failed"].items()) or "Nothing failed.\n"
    sections = {
        "The scan": _table(_SCAN, ["scan", "kernels", "forward", "training pass"], _scans(values)),
        "Whole models": _table(_MODELS, ["pixels", "images", "model", "inference", "training step"], _models(values)),
        "Losses": _table(_LOSSES.format(**BOUNDS), ["stage", "precision", "largest", "mean"], _losses(values)),
        "Waits": _table(_WAITS, ["ZeRO", "call", "per step"], _waits(values)),
        "Recipes": _table(
            _RECIPES,
            ["recipe", "seconds", "planned", "GiB", "planned", "MFU", "waiting"],
            _recipes(values),
        ),
        "Self-test": _table(
            "Relative errors to the reference, forward and backward.", ["scan", "error"], _self_test(values)
        ),
        "Left out": _table("", ["part", "why"], _left_out(values)),
    }
    told = ", ".join(f"{name} {values[key]}" for key, name in _TOLD.items() if key in values)
    head = f"# {values['device']}\n\nWritten by `make gpu-check`: {told}.\n\n## Failures\n\n{failed}"
    return head + "".join(f"\n## {name}\n\n{text}" for name, text in sections.items() if text)


def _table(words: str, columns: Sequence[str], rows: list[list[str]]) -> str:
    if not rows:
        return ""
    lines = [columns, ["---"] * len(columns), *rows]
    table = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    return f"{words}\n\n{table}" if words else table


def _number(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else f"{value:.3g}"


def _scans(values: Values) -> list[list[str]]:
    rows = [
        [f"{shape} {size}", name, *(_number(values[f"{shape}_{name}_{way}_ms"]) for way in ("forward", "train"))]
        for shape, size in SHAPES.items()
        for name in RIVALS
        if f"{shape}_{name}_forward_ms" in values
    ]
    mixers = [(name, f"mixer_{name}_train_ms") for name in RIVALS]
    return rows + [
        ["a mixer's two directions", name, "", _number(values[key])] for name, key in mixers if key in values
    ]


def _models(values: Values) -> list[list[str]]:
    return [
        [str(size), str(batch), name, *(_number(values[f"{name}_{size}_{way}_ms"]) for way in ("inference", "train"))]
        for size, batch in SIZES.items()
        for name in MODELS
        if f"{name}_{size}_train_ms" in values
    ]


def _losses(values: Values) -> list[list[str]]:
    found = (re.fullmatch(r"(losses_(.*)_(.*))_mean_difference", name) for name in values)
    return [
        [
            run[2].replace("_", ", "),
            run[3],
            *(f"{values[f'{run[1]}_{which}_difference']:.1e}" for which in ("largest", "mean")),
        ]
        for run in sorted(filter(None, found), key=lambda run: run[2])
    ]


def _waits(values: Values) -> list[list[str]]:
    calls = (re.fullmatch(r"waits_zero(\d)_(.*)", name) for name in values)
    return [[call[1], f"`{call[2]}`", _number(values[call[0]])] for call in calls if call]


def _left_out(values: Values) -> list[list[str]]:
    ending = "_left_out"
    return [[name.removesuffix(ending), str(why)] for name, why in values.items() if name.endswith(ending)]


def _self_test(values: Values) -> list[list[str]]:
    names = {name: name.removeprefix("scan_cuda_") for name in values if name.startswith("scan_cuda_")}
    return [[name, _number(values[key])] for key, name in names.items() if not isinstance(values[key], str)]


def _recipes(values: Values) -> list[list[str]]:
    ending = "_step_seconds_least"
    rows = []
    for key in (name.removesuffix(ending) for name in values if name.endswith(ending)):
        of = {name.removeprefix(f"{key}_"): value for name, value in values.items() if name.startswith(f"{key}_")}
        planned = f"{of['step_seconds_least']:.3g} to {of['step_seconds_planned']:.3g}"
        memory = _number(of["memory_gib"]), _number(of["memory_gib_planned"])
        name = key.replace("_imagenet_", "/")
        rows.append(
            [name, _number(of["step_seconds"]), planned, *memory, _number(of["mfu"]), _number(of["data_wait_share"])]
        )
    return rows
