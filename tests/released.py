"""The released code's numbers: where they lie, and the weights they were made with.

The weights are a pure function of the released parameter names, so nothing but names and results is stored.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(__file__).parent / "fixtures/released"


def load(name: str) -> dict[str, Tensor]:
    """The arrays of ``released_<name>.npz``."""
    with np.load(FOLDER / f"released_{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def load_json(name: str) -> dict:
    """The content of ``released_<name>.json``."""
    return json.loads((FOLDER / f"released_{name}.json").read_text())


def released_keys(architecture: str) -> dict[str, list[int]]:
    """Every released parameter and buffer of an architecture, with its shape, in the released order."""
    return load_json(f"{architecture}_keys")


def released_weights(keys: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """The weights that belong to released names and shapes."""
    return {name: _weight(name, tuple(shape)) for name, shape in keys.items()}


def released_slots(num_classes: int = 19, channels: int = 256) -> Tensor:
    """The memory of the network fixtures, ``[K, C]``, unit rows."""
    rng = np.random.default_rng(zlib.crc32(b"memory"))
    slots = torch.from_numpy(rng.standard_normal((num_classes, channels)).astype(np.float32))
    return slots / slots.norm(dim=1, keepdim=True)


def _weight(name: str, shape: tuple[int, ...]) -> Tensor:
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if name.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.int64)
    if len(shape) >= 2:
        values = rng.standard_normal(shape) / math.sqrt(math.prod(shape[1:]))
    elif name.endswith(".running_var"):
        values = rng.uniform(0.5, 1.5, shape)
    elif name.endswith((".running_mean", ".bias")):
        values = 0.1 * rng.standard_normal(shape)
    else:
        values = rng.uniform(0.4, 0.8, shape)
    return torch.from_numpy(np.asarray(values, np.float32))
