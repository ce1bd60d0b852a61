"""The losses of section 2 of the method, from the outputs of the network's parts.

Shapes: B images, K classes, C channels, h x w feature positions, H x W label pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pmm_fast import ops


def nearest_labels(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Labels ``[B, H, W]`` at a smaller size by the nearest-pixel law of ``F.interpolate``: index floor(i H / h)."""
    rows, columns = (
        (torch.arange(n, device=labels.device) * (full / n)).long().clamp(max=full - 1)
        for n, full in zip(size, labels.shape[1:], strict=True)
    )
    return labels[:, rows][:, :, columns]


def auxiliary_loss(aux_logits: Tensor, labels: Tensor, ignore_index: int = 255) -> Tensor:
    """Cross-entropy of the auxiliary head at its own resolution (released code ``deepv3plus.py:589-595``).

    Args:
        aux_logits: ``[B, K, h, w]``.
        labels: ``[B, H, W]``, brought to h x w by :func:`nearest_labels`.
        ignore_index: label that does not count.
    """
    size = (aux_logits.shape[2], aux_logits.shape[3])
    return ops.upsample_cross_entropy(aux_logits, nearest_labels(labels, size), ignore_index)


def cohesion_loss(scores: Tensor, labels: Tensor, temperature: float = 1.0, ignore_index: int = 255) -> Tensor:
    """Cross-entropy of the upsampled cosines: each feature near its own class's slot (``memory.py:172-176``).

    Args:
        scores: ``[B, K, h, w]`` cosines of :func:`pmm_fast.ops.memory_read`.
        labels: ``[B, H, W]``.
        temperature: divides the cosines.
        ignore_index: label that does not count.
    """
    return ops.upsample_cross_entropy(scores / temperature, labels, ignore_index)


def divergence_loss(memory: Tensor) -> Tensor:
    """Mean positive cosine of different slots: sum_{i != j} max(0, M_i . M_j) / (K (K - 1)) (``memory.py:264-272``).

    Args:
        memory: ``[K, C]``, unit rows.  One slot alone has loss 0.
    """
    slots = memory.shape[0]
    cosines = (memory @ memory.T).clamp(min=0)
    return (cosines.sum() - cosines.diagonal().sum()) / max(slots * (slots - 1), 1)


def classifier_loss(class_logits: Tensor) -> Tensor:
    """Cross-entropy of classifying slot k as class k (``memory.py:259-262``).

    Args:
        class_logits: ``[K, K]``, the memory classifier's output for every slot.
    """
    classes = torch.arange(class_logits.shape[0], device=class_logits.device)
    return F.cross_entropy(class_logits.to(ops.compute_dtype(class_logits.dtype)), classes)
