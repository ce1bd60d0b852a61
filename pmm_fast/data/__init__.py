"""Data: label spaces, image folders, training augmentation and the loader (``labels``, ``folder``, ``transforms``,
``loader``), and the generated street scenes (``streets``).

Importing this package loads none of them; the names below are resolved on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pmm_fast.data.folder import DataError as DataError
    from pmm_fast.data.folder import FolderDomain as FolderDomain
    from pmm_fast.data.folder import open_domain as open_domain
    from pmm_fast.data.labels import IGNORE as IGNORE
    from pmm_fast.data.labels import LabelSpace as LabelSpace
    from pmm_fast.data.labels import colourise as colourise
    from pmm_fast.data.labels import get_space as get_space
    from pmm_fast.data.labels import mapping as mapping
    from pmm_fast.data.loader import Batch as Batch
    from pmm_fast.data.loader import make_loader as make_loader
    from pmm_fast.data.transforms import denormalise as denormalise
    from pmm_fast.data.transforms import normalise as normalise

_NAMES = {
    **dict.fromkeys(("DataError", "FolderDomain", "open_domain"), "folder"),
    **dict.fromkeys(("IGNORE", "LabelSpace", "colourise", "get_space", "mapping"), "labels"),
    **dict.fromkeys(("Batch", "make_loader"), "loader"),
    **dict.fromkeys(("denormalise", "normalise"), "transforms"),
}


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(f"pmm_fast.data.{_NAMES[name]}"), name)
    raise AttributeError(f"module 'pmm_fast.data' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(_NAMES)
