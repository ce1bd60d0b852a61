"""The categorical memory as a module: one slot a class, a net that writes, a net that fuses what was read.

Usable by itself between anyone's encoder and decoder.  Released code: ``network/memory.py`` (``Memory_sup``).

Shapes: N images, C channels, K classes (slots), h x w feature positions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from pmm_fast import ops
from pmm_fast.models.batchnorm import BatchNorm2d
from pmm_fast.models.conv import Conv2d

# BatchNorm offset and classifier spread at the start (released ``network/memory.py:9-19``)
_INITIAL_OFFSET = 1e-4
_INITIAL_CLASSIFIER_STD = 1e-4


class MemoryOutput(NamedTuple):
    """What reading gives.

    Attributes:
        read_feature: ``[N, C, h, w]``, non-negative: replaces the feature in the decoder.
        scores: ``[N, K, h, w]`` float32, the cosines of each feature to each slot (input of the cohesion loss).
        assignment: ``[N, K, h, w]`` float32, the weights of the read; they sum to one over slots.
    """

    read_feature: Tensor
    scores: Tensor
    assignment: Tensor


class MemoryWriter(nn.Module):
    """The writing net U: ``relu(F + BN(W_u F))`` with a residual from the feature as it is, not normalised.

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 1, bias=False)
        self.bn = BatchNorm2d(channels)
        self.relu = nn.ReLU()
        _initialize(self)

    def forward(self, feature: Tensor) -> Tensor:
        """``[N, C, h, w]`` to ``[N, C, h, w]``, non-negative: what ``ops.masked_average_pool`` pools."""
        return self.relu(feature + self.bn(self.conv(feature)))


class MemoryFusion(nn.Module):
    """What becomes of a read: ``relu(BN(W_o [F / ||F||; read]))``, the normalised feature first.

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(2 * channels, channels, 1, bias=False)
        self.bn = BatchNorm2d(channels)
        self.relu = nn.ReLU()
        _initialize(self)

    def forward(self, feature: Tensor, read: Tensor) -> Tensor:
        """``[N, C, h, w]`` twice to ``[N, C, h, w]``, non-negative."""
        # squares of half-precision features overflow or vanish
        exact = feature.to(torch.promote_types(feature.dtype, torch.float32))
        query = ops.normalize(exact, 1).to(feature.dtype)
        return self.relu(self.bn(self.conv(torch.cat([query, read.to(feature.dtype)], 1))))


class SemanticMemory(nn.Module):
    """Memory of one unit vector a class, read by cosine similarity.

    ``read_feature = fusion(F, W M)`` with ``W = softmax((F^ M^T + noise) / temperature)``, ``F^ = F / ||F||``.

    Args:
        num_classes: K, slots.
        channels: C, width of a slot and of the feature.
        temperature: of the softmax over slots, positive.

    Attributes:
        slots: buffer ``[K, C]`` float32, unit rows; zeros until initialised (``ops.update_memory`` of pooled features).
        writer: :class:`MemoryWriter`, applied to features before they are pooled into ``slots``.
        fusion: :class:`MemoryFusion`.
        classifier: linear ``[K, C]`` and bias, for the classifier loss on the slots.

    Raises:
        ValueError: a size that is not positive.

    Note:
        ``forward`` never changes ``slots``: writing is ``ops.masked_average_pool`` and ``ops.update_memory``, and
        whoever trains stores the result.
    """

    slots: Tensor

    def __init__(self, num_classes: int, channels: int, temperature: float = 1.0) -> None:
        super().__init__()
        if num_classes < 1 or channels < 1:
            raise ValueError(
                f"SemanticMemory: num_classes and channels must be positive, got {num_classes} and {channels}"
            )
        if not temperature > 0:
            raise ValueError(f"SemanticMemory: temperature must be positive, got {temperature}")
        self.temperature = temperature
        self.register_buffer("slots", torch.zeros(num_classes, channels))
        self.writer = MemoryWriter(channels)
        self.fusion = MemoryFusion(channels)
        self.classifier = nn.Linear(channels, num_classes)
        nn.init.normal_(self.classifier.weight, std=_INITIAL_CLASSIFIER_STD)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, feature: Tensor, noise: Tensor | None = None) -> MemoryOutput:
        """Reads the memory as it stands.

        Args:
            feature: ``[N, C, h, w]`` floating point.
            noise: ``[N, K, h, w]`` from ``ops.gumbel_noise``, or None for the plain softmax.

        Returns:
            The fused feature, the raw cosines and the weights.

        Raises:
            ValueError: shapes that do not fit.
        """
        read, scores = ops.memory_read(feature, self.slots, noise, self.temperature)
        return MemoryOutput(self.fusion(feature, read), scores, ops.assignment(scores, noise, self.temperature))

    def extra_repr(self) -> str:
        return f"num_classes={self.slots.shape[0]}, channels={self.slots.shape[1]}, temperature={self.temperature}"


def _initialize(module: nn.Module) -> None:
    """Kaiming-normal convolutions (fan in), BatchNorm at 1 and 1e-4 (released ``network/memory.py:9-19``)."""
    for child in module.modules():
        if isinstance(child, nn.Conv2d):
            nn.init.kaiming_normal_(child.weight, nonlinearity="relu")
        elif isinstance(child, nn.BatchNorm2d):
            nn.init.ones_(child.weight)
            nn.init.constant_(child.bias, _INITIAL_OFFSET)
