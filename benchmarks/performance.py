"""docs/performance.md: a page with all figures in docs/performance.jsonl, and the picture of time against resolution.

This file imports no torch. A record is what `python -m benchmarks` writes for one benchmark on one machine.
"""

import ast
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.machine import QUIET

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "docs" / "performance.jsonl"
PAGE = ROOT / "docs" / "performance.md"
PICTURE = "time-against-resolution"
# The models of the picture.
CURVES = {
    "vim_small": "Vim-Small",
    "timm/vit_small_patch16_224": "ViT-Small",
    "efficientvim_m4": "EfficientViM-M4",
    "timm/shvit_s4": "SHViT-S4",
}
SIZES = (224, 448, 672, 896)
HEAD = """# Performance

The figures that `make bench` has measured, each with its command, machine and date. `make bench` takes those that the
current commit lacks on this machine and writes this page. `make bench SIMD=avx2` does so with AVX2 alone. ONNX Runtime keeps its
own choice then, so ratios to a rival that is fastest in it are worse than on a processor that has only AVX2. Both commands
continue where they stopped. All but `engine` take eleven minutes on two quiet cores; one benchmark is ended after ten. Each
also runs alone: `python -m benchmarks.NAME --help`. Models have random weights, which cost the same as trained ones.

A run is quiet if other programs used at most {quiet:.0%} of the processor meanwhile. Of other runs the ratios are better than the
times, because rivals take turns in the same rounds; they are no results.
"""


NONE = """**No figure has been taken yet.** Older figures are on the pages of their subjects, with their dates:
[selective scan](scan.md), [EfficientViM](efficientvim.md), [engine](engine.md), [data](data.md).
"""


def records() -> list[dict[str, Any]]:
    """Return all records, oldest first."""
    return [json.loads(line) for line in RECORDS.read_text().splitlines()] if RECORDS.exists() else []


def newest(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the last record of each benchmark on each machine; a quiet one stays before a later one that is not.

    Records of a benchmark follow one another from the newest to the oldest.
    """
    kept: dict[tuple[str, str, str], dict[str, Any]] = {}
    for record in found:
        key = record["name"], record["processor"], record["instructions"]
        if key not in kept or is_quiet(record) or not is_quiet(kept[key]):
            kept.pop(key, None)
            kept[key] = record
    from_newest = list(kept.values())[::-1]
    return sorted(from_newest, key=lambda r: r["name"])


def is_quiet(record: dict[str, Any]) -> bool:
    """Whether others used at most the share `QUIET` of the processor."""
    return bool(record["others"] <= QUIET)


def page(found: list[dict[str, Any]], *, picture: bool) -> str:
    """Return the page of these records, with the picture or without."""
    lines = [HEAD.format(quiet=QUIET)]
    if not found:
        lines += [NONE]
    if picture:
        lines += ["## Time against resolution", "", *_about(_curves(found)[:1]), ""]
        lines += [f"![milliseconds for one image against pixels on a side](images/{PICTURE}.svg)", ""]
    for name in dict.fromkeys(record["name"] for record in found):
        of_name = [record for record in found if record["name"] == name]
        lines += [f"## {name}", "", _summary(of_name[0]["command"]), "", *_about(of_name), ""]
        columns = "".join(f" {i} |" for i in range(1, len(of_name) + 1))
        lines += [f"| |{columns}", "|---|" + "---:|" * len(of_name)]
        keys = dict.fromkeys(key for record in of_name for key in record["figures"])
        lines += [
            f"| `{key}` |" + "".join(f" {_shown(record['figures'].get(key))} |" for record in of_name) for key in keys
        ]
        lines += [""]
    return "\n".join(lines)


def _about(of_name: list[dict[str, Any]]) -> list[str]:
    """Say of each record, as a numbered list, where, when and how it was taken."""
    said = []
    for i, r in enumerate(of_name, start=1):
        how = "quiet" if is_quiet(r) else f"NOT quiet: others used {r['others']:.0%} of the processor"
        where = f"{r['processor']}, {r['instructions']}; {r['date']}, commit `{r['commit']}`, {r['seconds']} s; {how}"
        said.append(f"{i}. {where}: `{r['command']}`")
    return said


def _summary(command: str) -> str:
    """Return the first sentence of the docstring of a command's benchmark, without the command in it."""
    module = command.split()[2].removeprefix("benchmarks.")
    text = ast.get_docstring(ast.parse((Path(__file__).parent / f"{module}.py").read_text())) or ""
    first = text.split(": python -m")[0].split(": `python")[0].splitlines()[0]
    return first.rstrip(".") + "."


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _curves(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [r for r in found if r["name"] == "resolution" and all(f"{m}_{SIZES[0]}_ms" in r["figures"] for m in CURVES)]


def write_page() -> Path:
    """Write the page and, if there are figures for it, the picture; return the page's path."""
    from pipeline.files import replace_text
    from pipeline.report.figures import draw, lines

    found = newest(records())
    curves = _curves(found)
    if curves:
        figures = curves[0]["figures"]
        series = {
            label: [(list(map(float, SIZES)), [figures[f"{model}_{size}_ms"] for size in SIZES])]
            for model, label in CURVES.items()
        }
        paint = lines(series, "pixels on a side", "milliseconds for one image", logy=True, at=SIZES)
        with tempfile.TemporaryDirectory() as folder:  # the site needs no PDF
            draw(Path(folder), PICTURE, "Time against resolution", paint, size=(6.4, 4.0))
            replace_text(PAGE.parent / "images" / f"{PICTURE}.svg", (Path(folder) / f"{PICTURE}.svg").read_text())
    replace_text(PAGE, page(found, picture=bool(curves)))
    return PAGE
