"""The memory operators as the released code computes them: the baseline of ``python bench/memory_ops.py``.

Plain PyTorch, step for step the chain of operators that ``network/memory.py`` and ``network/deepv3plus.py`` of the
released code run (docs/design.md names the commit), with nothing left out that costs time there, needed or not: labels
as a full-resolution int64 one-hot map, logits upsampled to every pixel, noise for a softmax that nobody uses.

Letters: B images, C channels, K classes, h x w feature positions, H x W label pixels, N = B h w.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Draw = Callable[[Tensor], Tensor]  # scores [N, K] -> Gumbel noise of the same shape


def draw_gumbel(scores: Tensor) -> Tensor:
    """Fresh standard Gumbel noise, as ``F.gumbel_softmax`` draws it."""
    return -torch.empty_like(scores, memory_format=torch.legacy_contiguous_format).exponential_().log()


def one_hot_masses(labels: Tensor, size: tuple[int, int], num_classes: int, ignore_index: int) -> Tensor:
    """The share of each class at each position, ``[B, K + 1, h, w]``; the last one is the ignored pixels'.

    The one-hot map is int64, ``8 (K + 1)`` bytes a label pixel, and lives three times: as it is made, with its axes
    put in order, and as float32.
    """
    slots = labels.to(torch.int64, copy=True)
    slots[slots == ignore_index] = num_classes
    one_hot = F.one_hot(slots, num_classes + 1)
    return F.interpolate(one_hot.permute(0, 3, 1, 2).contiguous().float(), size, mode="bilinear", align_corners=True)


def _present(mass: Tensor) -> bool:
    """Whether a class occurs, which the host waits for, slot by slot.

    It cannot while a CUDA graph is captured; every class counts as present then, to the released code's advantage.
    """
    return (mass.is_cuda and torch.cuda.is_current_stream_capturing()) or bool(mass != 0)


def masked_average_pool(
    features: Tensor, labels: Tensor, num_classes: int, ignore_index: int = 255
) -> tuple[Tensor, Tensor]:
    """``sums [K, C]`` and ``mass [K]``: memory.py:209-237 up to the mixing with the old memory."""
    masses = one_hot_masses(labels, (features.shape[2], features.shape[3]), num_classes, ignore_index)
    normalised = F.normalize(features.clone(), dim=1).flatten(2)
    masses = masses.flatten(2).permute(0, 2, 1)
    per_image = torch.matmul(normalised, masses.to(normalised.dtype))
    pooled = per_image.sum(0).t()
    mass = masses.sum((0, 1))[:num_classes]
    sums = torch.zeros_like(pooled[:num_classes])
    for k in range(num_classes):
        if _present(mass[k]):
            sums[k] = pooled[k]
    return sums, mass


def memory_read(features: Tensor, memory: Tensor, draw: Draw = draw_gumbel) -> tuple[Tensor, Tensor]:
    """``[f^ ; read] [B, 2C, h, w]`` before the projection, and ``scores [B, K, h, w]``: memory.py:167-189, 317-334.

    The softmax over all positions is not used by anything; the released code computes it, so it is here.
    """
    batch, channels, height, width = features.shape
    query = F.normalize(features.clone(), dim=1).permute(0, 2, 3, 1).contiguous()
    scores = torch.matmul(query, memory.t())
    flat = scores.reshape(-1, memory.shape[0])
    torch.softmax(flat + draw(flat), 0)
    over_slots = torch.softmax(flat + draw(flat), 1)
    read = torch.matmul(over_slots, memory)
    both = torch.cat((query.reshape(-1, channels), read), 1)
    both = both.view(batch, height, width, 2 * channels).permute(0, 3, 1, 2).contiguous()
    return both, scores.permute(0, 3, 1, 2)


def memory_pass(
    features: Tensor,
    written: Tensor,
    labels: Tensor,
    memory: Tensor,
    ignore_index: int = 255,
    draw: Draw = draw_gumbel,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The read of ``features``, then the pooling of ``written``."""
    read, scores = memory_read(features, memory, draw)
    sums, mass = masked_average_pool(written, labels, memory.shape[0], ignore_index)
    return read, scores, sums, mass


def upsample_cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int = 255) -> Tensor:
    """Logits at every label pixel, then their cross-entropy: deepv3plus.py:575-578, memory.py:172-176."""
    size = (labels.shape[1], labels.shape[2])
    upsampled = F.interpolate(logits, size, mode="bilinear", align_corners=True)
    return F.cross_entropy(upsampled, labels.long(), ignore_index=ignore_index)
