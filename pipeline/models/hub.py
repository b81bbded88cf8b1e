"""The export's README.md: a model card in Hugging Face's form, made of what model.json says, for people and for the hub."""

import json

from pipeline.models.card import Card

README = "README.md"
_EXAMPLE = """from pathlib import Path

from pipeline.predict import predict

predict(Path("{folder}"), [Path("image.jpg")], top=5, cam=None)"""


def model_card(card: Card, folder: str) -> str:
    """Markdown with a YAML header. Values are JSON, which is YAML too, so that no name of a class can break it."""
    classifier = card.kind == "classifier"
    header = {
        "library_name": "pytorch",
        "pipeline_tag": "image-classification" if classifier else "image-feature-extraction",
        "tags": [card.model.name, card.lineage.stage, "safetensors"],
    }
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in header.items()), "---", ""]
    height, width = card.model.image_size
    lines += [f"# {card.model.name}, stage {card.lineage.stage}", ""]
    lines += [
        f"A {card.kind} for images of {height} x {width} pixels"
        + (f", {len(card.classes)} classes." if classifier else ".")
    ]
    lines += ["", "| | |", "|---|---|"]
    mean, std = (", ".join(f"{v:g}" for v in values) for values in (card.preprocessing.mean, card.preprocessing.std))
    rows = {
        "preprocessing": f"shorter side to {height} / 0.875 (bicubic), centre crop, pixels in [0, 1] minus {mean}, over {std}",
        "weights": f"`model.safetensors`, fp32, sha256 `{card.weights_sha256}`",
        "data": f"manifest `{card.lineage.dataset}`"
        + (f", split `{card.lineage.split}`" if card.lineage.split else ""),
        "parents": "; ".join(f"{p.role} `{p.weights_sha256[:16]}`" for p in card.lineage.parents) or "none",
        "labels seen": "; ".join(f"{s.count} ({s.protocol})" for s in card.labels_seen) or "none",
        "commit": f"`{card.lineage.commit}`",
    }
    lines += [f"| {name} | {value.replace('|', '/')} |" for name, value in rows.items()]
    if card.more_labels_than_claimed:
        lines += ["", "**It has seen more labels than its split claims.**"]
    if card.metrics:
        lines += ["", "| measured | |", "|---|---:|", *(f"| {k} | {v:.4g} |" for k, v in card.metrics.items())]
    if classifier:
        lines += ["", "```python", _EXAMPLE.format(folder=folder), "```"]
        lines += ["", "Classes, in the order of the logits: " + ", ".join(card.classes)]
    return "\n".join(lines) + "\n"
