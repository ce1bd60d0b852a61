"""pmm_fast: Pin the Memory (CVPR 2022), exact and fast.

Memory-guided, domain-generalised semantic segmentation.  Importing this package loads nothing heavy: sub-packages and
names are resolved on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_SUBMODULES = ("config", "convert", "data", "engine", "meta", "models", "ops", "viz")
_NAMES = {
    "build_model": "pmm_fast.models",
    "SemanticMemory": "pmm_fast.models",
    "Predictor": "pmm_fast.engine.predict",
    "load": "pmm_fast.engine.checkpoint",
    "save": "pmm_fast.engine.checkpoint",
}

__all__ = ["__version__", *_SUBMODULES, *_NAMES]


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"pmm_fast.{name}")
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    raise AttributeError(f"module 'pmm_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
