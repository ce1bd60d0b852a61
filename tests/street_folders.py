"""Tiny labelled image folders, and the configuration of a run on them that takes a second or two."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pmm_fast.config import Config, from_dict
from pmm_fast.engine import checkpoint
from pmm_fast.engine.trainer import Trainer

SPACE, CLASSES, SIZE = "idd_lite7", 7, (48, 64)
NAMES = ("alpha", "beta", "gamma")


def make_domain(root: Path, seed: int = 0, images: int = 4) -> Path:
    """A folder with ``images/`` and ``labels/``: noise over a colour, and blocks of every class and of ignore."""
    rng = np.random.default_rng(seed)
    ids = np.array([*range(CLASSES), 255], np.uint8)
    for index in range(images):
        colour = rng.integers(0, 192, 3)
        pixels = (colour + rng.integers(0, 64, (*SIZE, 3))).astype(np.uint8)
        # every id stands in every image: 12 x 16 blocks of 4 x 4 pixels
        blocks = rng.permutation(np.resize(ids, SIZE[0] * SIZE[1] // 16)).reshape(SIZE[0] // 4, SIZE[1] // 4)
        for kind, array in (("images", pixels), ("labels", blocks.repeat(4, 0).repeat(4, 1))):
            (root / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(root / kind / f"{index}.png")
    return root


def make_domains(root: Path, names: tuple[str, ...] = NAMES) -> Path:
    """Folders of several domains below ``root``."""
    for seed, name in enumerate(names):
        make_domain(root / name, seed)
    return root


def tiny_config(root: Path, out: Path, options: Mapping[str, Any] | None = None) -> Config:
    """A run of two domains below ``root`` on the CPU.

    Args:
        root: folder of ``make_domains``.
        out: folder of the run.
        options: full keys (``meta.order``) to values, over the defaults here.
    """
    values: dict[str, Any] = {
        "data.label_space": SPACE,
        "data.sources": list(NAMES[:2]),
        "data.unseen": [],
        "data.domains": {name: {"root": str(root / name)} for name in NAMES},
        "data.crop": list(SIZE),
        "data.scale": [0.75, 1.5],
        "data.batch_per_domain": 2,
        "data.workers": 0,
        "data.loader": "torch",
        "model.architecture": "deeplabv3plus_mobilenet_v2",
        "model.channels": 8,
        "model.weights": "none",
        "memory.init_passes": 1,
        "memory.init_iterations": 2,
        "optim.iterations": 2,
        "optim.horizon": 100,
        "out": str(out),
        "device": "cpu",
        "log_every": 1,
        **(options or {}),
    }
    nested: dict[str, Any] = {}
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[name] = value
    return from_dict(nested, "test")


def train(root: Path, out: Path, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Run ``tiny_config`` and return its checkpoint."""
    return checkpoint.read(Trainer(tiny_config(root, out, options)).run())


def log_lines(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log, without the two entries that no two runs share."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(line["seconds"] > 0 and 0 <= line["data_wait"] <= 1 for line in lines)
    return [{key: value for key, value in line.items() if key not in ("seconds", "data_wait")} for line in lines]


def same(first: Any, second: Any) -> bool:
    """Whether two nests of dictionaries, lists, tensors and plain values are equal, tensors bit for bit."""
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return (
            isinstance(second, dict) and first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
        )
    if isinstance(first, list | tuple):
        return (
            type(first) is type(second)
            and len(first) == len(second)
            and all(same(a, b) for a, b in zip(first, second, strict=True))
        )
    return type(first) is type(second) and first == second
