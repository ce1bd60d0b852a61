"""The losses of section 2 of the method, from the outputs of the network's parts.

Shapes: B images, K classes, C channels, h x w feature positions, H x W label pixels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pmm_fast import ops
from pmm_fast.ops.collective import sum_over_ranks


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


class Shares(NamedTuple):
    """What this rank's means count for in the means over all ranks, scalars n_r / sum_s n_s; 0 where the sum is 0.

    ``labelled``: by labelled pixels (segmentation and cohesion loss).  ``auxiliary``: by those that remain at the
    auxiliary head's resolution.  ``images``: by images.
    """

    labelled: Tensor
    auxiliary: Tensor
    images: Tensor


def shares_of_rank(labels: Tensor, aux_size: tuple[int, int], group: str, ignore_index: int = 255) -> Shares:
    """The shares of this rank in the batch that the ranks of a group have between them; one collective.

    Args:
        labels: ``[B, H, W]``, this rank's; B may differ between ranks.
        aux_size: (h, w) of the auxiliary head's logits.
        group: name of the process group.
        ignore_index: label that does not count.

    Returns:
        :class:`Shares`, float64 on the device of the labels.
    """
    counts = [(part != ignore_index).sum() for part in (labels, nearest_labels(labels, aux_size))]
    own = torch.stack([*counts, torch.full_like(counts[0], len(labels))])
    return Shares(*(own.double() / sum_over_ranks(own, group).clamp(min=1)).unbind())
