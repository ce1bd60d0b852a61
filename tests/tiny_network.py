"""A network with random weights that tells images and classes apart, saved as a checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import pmm_fast
from pmm_fast.data.labels import get_space
from pmm_fast.models import Segmentor, build_model


def tiny_network(space: str = "cityscapes19") -> Segmentor:
    """DeepLabV3+ on MobileNetV2 of eight channels, in evaluation mode."""
    torch.manual_seed(0)
    classes = get_space(space).num_classes
    model = build_model("deeplabv3plus_mobilenet_v2", classes, channels=8).eval()
    model.label_space = space
    with torch.no_grad():
        model.memory.slots.copy_(F.normalize(torch.rand(classes, 8), dim=1))
        # with the weights as they are drawn one class would win everywhere
        for parameter in model.decoder.parameters():
            parameter.mul_(2)
    return model


def save_network(path: Path, space: str = "cityscapes19") -> Path:
    """The checkpoint of ``tiny_network``."""
    pmm_fast.save(tiny_network(space), path)
    return path


def fill_memory(*_: object, **options: object) -> None:
    """Stands in for a network that the CPU has too little memory for: a petabyte."""
    torch.empty(1 << 50)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    """An image of random pixels, uint8 ``[height, width, 3]``."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
