"""A staged pipeline for vision models: ARM pretraining, distillation, semi-supervised fine-tuning.

The names below are its face for notebooks and scripts:

    result = pipeline.run_stage("semi", "configs/semi/demo.yaml", ["loop.steps=100"])
    predictions = pipeline.load(result.export).predict("photos/")

They are loaded at first use, so that `import pipeline` stays light. `__init__.pyi` tells type checkers what they are.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_MODULES = {
    "Classifier": "pipeline.classifier",
    "Prediction": "pipeline.classifier",
    "load": "pipeline.classifier",
    "Result": "pipeline.notebook",
    "run_stage": "pipeline.notebook",
}
__all__ = ["__version__", *_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
