"""The compiled modules: loaded when first needed, and why one is absent.

``_C`` holds the CPU kernels, ``_CUDA`` the CUDA ones.  Neither knows torch: they take addresses, sizes and, on a GPU, a
stream.  So they need no torch to be built and fit every version of it.
"""

from __future__ import annotations

import importlib
import json
from functools import cache
from pathlib import Path
from types import ModuleType

_REPORT = Path(__file__).resolve().parents[1] / "_build.json"


@cache
def _load(name: str) -> tuple[ModuleType | None, str | None]:
    """The module, or why there is none; a failure is not tried again."""
    try:
        return importlib.import_module(f"pmm_fast.{name}"), None
    except ModuleNotFoundError:
        report = build_report().get(name, "nothing was compiled when it was installed")
        return None, "it was built, but the file is gone" if report == "built" else f"not part of this build: {report}"
    except ImportError as error:
        return None, f"the compiled module does not load: {error}"


def load(name: str) -> ModuleType:
    """The compiled module ``_C`` or ``_CUDA``.

    Raises:
        RuntimeError: there is none, with the reason.
    """
    module, reason = _load(name)
    if module is None:
        raise RuntimeError(f"pmm_fast.{name}: {reason}")
    return module


def missing(name: str) -> str | None:
    """Why a compiled module is absent, or None."""
    return _load(name)[1]


def build_report() -> dict[str, str]:
    """What the installation did about each compiled module, as setup.py left it."""
    try:
        return json.loads(_REPORT.read_text())
    except (OSError, ValueError):
        return {}
