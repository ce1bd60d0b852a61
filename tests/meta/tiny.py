"""A segmentor small and smooth enough for finite differences in float64, with the real memory module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pmm_fast import meta, ops
from pmm_fast.models import SemanticMemory
from pmm_fast.models.blocks import Features

CLASSES, CHANNELS, SIZE, FEATURE_SIZE = 4, 5, (12, 16), (6, 8)


class TinyEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, CHANNELS, 3, stride=2, padding=1), nn.BatchNorm2d(CHANNELS)

    def forward(self, images: Tensor) -> Features:
        feature = nn.functional.softplus(self.bn(self.conv(images)))
        return Features(feature, feature, feature)


class TinyDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(2 * CHANNELS, CLASSES, 1)

    def forward(self, feature: Tensor, low_level: Tensor) -> Tensor:
        return self.head(torch.cat([feature, low_level], 1))


class TinySegmentor(nn.Module):
    def __init__(self, memory: bool = True, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.encoder, self.decoder = TinyEncoder(), TinyDecoder()
        self.aux_head = nn.Conv2d(CHANNELS, CLASSES, 1)
        self.memory = SemanticMemory(CLASSES, CHANNELS) if memory else None
        self.double()
        if self.memory is not None:
            self.memory.slots.copy_(ops.normalize(torch.rand(CLASSES, CHANNELS, dtype=torch.float64), 1))
            # large enough that the classifier's loss bends: its released start is 1e-4
            nn.init.normal_(self.memory.classifier.weight)


def tiny_batch(seed: int, images: int = 3) -> meta.Batch:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (images, *SIZE), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.1] = 255
    return meta.Batch(torch.randn(images, 3, *SIZE, generator=generator, dtype=torch.float64), labels)


def tiny_noise(seed: int, images: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return ops.gumbel_noise((images, CLASSES, *FEATURE_SIZE), generator, dtype=torch.float64)


def tiny_problem(mode: str = "pinmem", **options):
    """State, batches, noise and settings of one step in the given mode."""
    model = TinySegmentor(memory=mode in meta.MEMORY_MODES)
    state = meta.split_state(model)
    test = tiny_batch(2) if mode in meta.META_MODES else None
    noise = meta.Noise(tiny_noise(3), tiny_noise(4)) if mode in meta.MEMORY_MODES else meta.Noise()
    settings = {"inner_lr": 0.5, "cohesion_weight": 0.3} | options
    return (*state, tiny_batch(1), test, noise, meta.Hyper(meta.Network(model), mode, **settings))
