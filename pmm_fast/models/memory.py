"""The categorical memory as a module: one slot a class, a net that writes, a net that fuses what was read.

Usable by itself between anyone's encoder and decoder.  Released code: ``network/memory.py`` (``Memory_sup``).

Shapes: N images, C channels, K classes (slots), h x w feature positions.
"""

from __future__ import annotations

from collections.abc import Iterable
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
        No method changes ``slots``: :meth:`initial_slots` and :meth:`write` return what they should become, and whoever
        trains stores it, ``memory.slots.copy_(...)``, once the backward pass that read the old ones is over.
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

    def write(self, feature: Tensor, labels: Tensor, momentum: float = 0.8, ignore_index: int = 255) -> Tensor:
        """The memory after these images: each slot moved towards the mean written feature of its class.

        ``normalize(momentum M_k + (1 - momentum) mean_k)`` with ``mean_k`` over the pixels of class k of the normalised
        writing net's output U(F); a class that is absent keeps its slot (released code ``network/memory.py:204-257``).

        Args:
            feature: ``[N, C, h, w]`` floating point.
            labels: ``[N, H, W]``, any integer dtype, classes ``0..K-1`` or ``ignore_index``.
            momentum: weight of the old memory, in [0, 1].
            ignore_index: label of pixels that belong to no class.

        Returns:
            ``[K, C]``, rows of unit norm; differentiable twice in ``feature`` and the writing net.

        Raises:
            ValueError: shapes that do not fit, or a momentum outside [0, 1].
        """
        sums, mass = ops.masked_average_pool(self.writer(feature), labels, self.slots.shape[0], ignore_index)
        return ops.update_memory(self.slots, sums, mass, momentum)

    def initial_slots(self, samples: Iterable[tuple[Tensor, Tensor]], ignore_index: int = 255) -> Tensor:
        """The memory to start from: the mean normalised feature of every class, the writing net left out.

        Args:
            samples: pairs of ``feature [N, C, h, w]`` and ``labels [N, H, W]``, as many as it takes to see each class.
            ignore_index: label of pixels that belong to no class.

        Returns:
            ``[K, C]``, rows of unit norm, a zero row for a class that was never seen; without gradient.

        Raises:
            ValueError: shapes that do not fit.
        """
        sums, mass = torch.zeros_like(self.slots), torch.zeros_like(self.slots[:, 0])
        with torch.no_grad():
            for feature, labels in samples:
                found = ops.masked_average_pool(feature, labels, self.slots.shape[0], ignore_index)
                sums, mass = sums + found[0], mass + found[1]
            return ops.update_memory(torch.zeros_like(self.slots), sums, mass, momentum=0.0)

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
