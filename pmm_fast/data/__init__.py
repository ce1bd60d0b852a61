"""Data: label spaces, data sets and image folders, training augmentation and the loader (``labels``, ``datasets``,
``folder``, ``transforms``, ``loader``), and the generated street scenes (``streets``).

Importing this package loads none of them; the names below are resolved on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pmm_fast.data.datasets import DATASETS as DATASETS
    from pmm_fast.data.datasets import get_dataset as get_dataset
    from pmm_fast.data.files import DataError as DataError
    from pmm_fast.data.folder import FolderDomain as FolderDomain
    from pmm_fast.data.folder import open_domain as open_domain
    from pmm_fast.data.folder import open_listing as open_listing
    from pmm_fast.data.labels import IGNORE as IGNORE
    from pmm_fast.data.labels import LabelSpace as LabelSpace
    from pmm_fast.data.labels import colourise as colourise
    from pmm_fast.data.labels import get_space as get_space
    from pmm_fast.data.labels import mapping as mapping
    from pmm_fast.data.listing import Listing as Listing
    from pmm_fast.data.listing import list_domain as list_domain
    from pmm_fast.data.loader import choose_loader as choose_loader
    from pmm_fast.data.loader import make_loader as make_loader
    from pmm_fast.data.sampling import Batch as Batch
    from pmm_fast.data.transforms import denormalise as denormalise
    from pmm_fast.data.transforms import normalise as normalise

_NAMES = {
    **dict.fromkeys(("DATASETS", "get_dataset"), "datasets"),
    "DataError": "files",
    **dict.fromkeys(("FolderDomain", "open_domain", "open_listing"), "folder"),
    **dict.fromkeys(("IGNORE", "LabelSpace", "colourise", "get_space", "mapping"), "labels"),
    **dict.fromkeys(("Listing", "list_domain"), "listing"),
    **dict.fromkeys(("choose_loader", "make_loader"), "loader"),
    "Batch": "sampling",
    **dict.fromkeys(("denormalise", "normalise"), "transforms"),
}


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(f"pmm_fast.data.{_NAMES[name]}"), name)
    raise AttributeError(f"module 'pmm_fast.data' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(_NAMES)
