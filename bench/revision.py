"""Which commit is measured."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VARIABLE = "PMM_FAST_COMMIT"


def revision() -> str:
    """Twelve digits of the commit, and ``+changes`` where tracked files differ from it.

    The variable ``PMM_FAST_COMMIT`` goes before: a tree that was copied to a machine has no git that could be asked.
    Neither: ``unknown``.
    """
    if given := os.environ.get(VARIABLE):
        return given
    digits = _git("rev-parse", "--short=12", "HEAD")
    return digits + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else "") or "unknown"


def _git(*words: str) -> str:
    try:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return ""
