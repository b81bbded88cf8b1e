"""Files of an export that others read: README.md, a model card in Hugging Face's form, and config.json for timm.

Both are made from model.json. No code of ours reads them. timm needs `import pipeline.timm_models` for models that it lacks.
"""

import json
from typing import Any

from torch import nn

from pipeline.exports.card import Card
from pipeline.models.config import EfficientViMConfig, VisionMambaConfig
from pipeline.models.timm_model import TimmModel
from pipeline.models.timm_names import FIRST_CONVOLUTION, NAMES, classifiers, registered_name

README = "README.md"
TIMM_CONFIG = "config.json"
_EXAMPLE = """import pipeline

for prediction in pipeline.load("{folder}").predict("image.jpg"):
    print(prediction)"""
_WITH_TIMM = """{imports}

model = timm.create_model("local-dir:{folder}", pretrained=True).eval()
view = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
# then (model(view(image)[None]) / {temperature:.4g}).softmax(-1)"""


def timm_config(card: Card, model: nn.Module) -> dict[str, Any] | None:
    """Return what `timm.create_model("local-dir:EXPORT", pretrained=True)` reads, or None for a pretrainer."""
    if card.kind != "classifier":
        return None
    layers: dict[str, Any] = {}
    if isinstance(model, TimmModel):
        name, arguments = model.timm_name, model.arguments
    elif isinstance(card.model, EfficientViMConfig) and _as_released(card.model):
        c = card.model
        base = c.name.removesuffix("_dist")
        base = base if base.removeprefix("efficientvim_") in ("m1", "m2", "m3", "m4") else "efficientvim_m1"
        name = base + "_dist" * c.distilled
        arguments = {"embed_dim": c.widths, "depths": c.depths, "state_dim": c.states}
        arguments |= {"mlp_ratio": c.mlp_ratio, "ssd_expand": c.expand, "in_chans": c.in_chans}
    else:
        name = registered_name(card.model)
        arguments = card.model.model_dump(mode="json", exclude={"name", "num_classes", "drop_path", "image_size"})
        arguments["img_size"] = card.model.image_size
        layers = {"first_conv": FIRST_CONVOLUTION[type(card.model)], "classifier": classifiers(card.model)}
        layers["fixed_input_size"] = isinstance(card.model, VisionMambaConfig)
    height, width = card.model.image_size
    view = card.preprocessing.view
    return {
        "architecture": name,
        "num_classes": len(card.classes),
        "label_names": list(card.classes),
        "model_args": arguments,
        "ground": card.preprocessing.ground,
        "pretrained_cfg": {
            "input_size": [card.model.in_chans, height, width],
            "mean": card.preprocessing.mean,
            "std": card.preprocessing.std,
            "interpolation": view.interpolation,
            "crop_pct": view.crop,
            "crop_mode": "center" if view.resize == "shorter" else "squash",
            "num_classes": len(card.classes),
            **layers,
        },
    }


def timm_alone_has(config: dict[str, Any] | None) -> bool:
    """Whether timm builds the model of such a config.json without this project."""
    return config is not None and config["architecture"] not in NAMES


def _as_released(c: EfficientViMConfig) -> bool:
    fixed = ("stem_stride", "mixer", "importance", "fusion", "norm")
    return all(getattr(c, name) == EfficientViMConfig.model_fields[name].default for name in fixed)


def model_card(card: Card, folder: str, *, for_timm: bool) -> str:
    """Return README.md: Markdown with a YAML header.

    The header's values are JSON, which is valid YAML, so that no class name can break it.

    Args:
        card: The export's card.
        folder: Name of the export's folder, for the examples.
        for_timm: Whether timm alone builds the model of the folder's config.json.
    """
    classifier = card.kind == "classifier"
    header = {
        "library_name": "timm" if for_timm else "pytorch",
        "pipeline_tag": "image-classification" if classifier else "image-feature-extraction",
        "tags": [card.model.name, card.lineage.stage, "safetensors", *(["timm"] if for_timm else [])],
    }
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in header.items()), "---", ""]
    height, width = card.model.image_size
    lines += [f"# {card.model.name}, stage {card.lineage.stage}", ""]
    lines += [
        f"A {card.kind} for images of {height} x {width} pixels (height x width)"
        + (f", {len(card.classes)} classes." if classifier else ".")
    ]
    lines += ["", "| | |", "|---|---|"]
    mean, std = (", ".join(f"{v:g}" for v in values) for values in (card.preprocessing.mean, card.preprocessing.std))
    ground = ", ".join(map(str, card.preprocessing.ground))
    rows: dict[str, str] = {
        "preprocessing": f"transparent pixels on the ground {ground} (red, green, blue of 255), {card.preprocessing.view.words},"
        f" then (pixels in [0, 1] - mean) / std with mean {mean} and std {std}",
        "probabilities": f"softmax(logits / {card.temperature:.4g}); {card.calibration or 'not calibrated'}",
        "training": str(card.selected) if card.selected else "unknown",
        "weights": f"`model.safetensors`, fp32, sha256 `{card.weights_sha256}`",
        "data": f"manifest `{card.lineage.dataset}`"
        + (f", split `{card.lineage.split}`" if card.lineage.split else ""),
        "fingerprint": f"`fingerprint.safetensors`, images and outputs to compare with, sha256 `{card.fingerprint_sha256}`",
        "parents": "; ".join(f"{p.role} `{p.weights_sha256[:16]}`" for p in card.lineage.parents) or "none",
        "labels seen": "; ".join(f"{s.count} ({s.protocol})" for s in card.labels_seen) or "none",
        "assumed": "; ".join(card.assumptions),
        "commit": f"`{card.lineage.commit}`",
    }
    if not card.assumptions:
        del rows["assumed"]
    if not classifier:
        del rows["probabilities"]
    lines += [f"| {name} | {value.replace('|', '/')} |" for name, value in rows.items()]
    if card.more_labels_than_claimed:
        lines += ["", "**This model has seen more labels than its split claims.**"]
    if card.metrics:
        lines += ["", "| measured | |", "|---|---:|", *(f"| {k} | {v:.4g} |" for k, v in card.metrics.items())]
    if classifier:
        lines += ["", "```python", _EXAMPLE.format(folder=folder), "```"]
        imports = "import timm" if for_timm else "import pipeline.timm_models\nimport timm"
        lines += ["", "Without this project, from the folder above:" if for_timm else "As a model of timm:"]
        code = _WITH_TIMM.format(imports=imports, folder=folder, temperature=card.temperature)
        lines += ["", "```python", code, "```"]
        lines += ["", "Classes, in the order of the logits: " + ", ".join(card.classes)]
    return "\n".join(lines) + "\n"
