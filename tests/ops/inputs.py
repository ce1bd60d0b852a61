"""Random inputs of the operators."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pmm_fast import ops


class Inputs(NamedTuple):
    features: Tensor
    written: Tensor
    labels: Tensor
    memory: Tensor
    noise: Tensor


def make_inputs(
    batch: int = 2,
    channels: int = 6,
    classes: int = 4,
    size: tuple[int, int] = (3, 5),
    label_size: tuple[int, int] = (7, 11),
    ignored: float = 0.2,
    dtype: torch.dtype = torch.float64,
    label_dtype: torch.dtype = torch.uint8,
    seed: int = 0,
) -> Inputs:
    """Features, written features, labels with a share of ignored pixels, unit memory and Gumbel noise."""
    generator = torch.Generator().manual_seed(seed)
    features, written = torch.randn(2, batch, channels, *size, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(0, classes, (batch, *label_size), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < ignored] = 255
    memory = ops.normalize(torch.randn(classes, channels, generator=generator, dtype=torch.float64), 1)
    noise = ops.gumbel_noise((batch, classes, *size), generator, dtype=torch.float64)
    return Inputs(features, written, labels.to(label_dtype), memory.to(ops.compute_dtype(dtype)), noise)


def one_hot_masses(labels: Tensor, size: tuple[int, int], classes: int, dtype: torch.dtype) -> Tensor:
    """Class masses by the definition: full-resolution one-hot labels, sampled bilinearly with aligned corners."""
    slots = torch.where(labels.long() == 255, classes, labels.long())
    one_hot = torch.nn.functional.one_hot(slots, classes + 1).permute(0, 3, 1, 2).to(dtype)
    sampled = torch.nn.functional.interpolate(one_hot, size, mode="bilinear", align_corners=True)
    return sampled[:, :classes]
