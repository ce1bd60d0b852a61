"""Masked average pooling over all classes at once, and the memory update made from it."""

from __future__ import annotations

from torch import Tensor

from pmm_fast.ops import reference
from pmm_fast.ops.backends import dispatch, register
from pmm_fast.ops.checks import check_labels, check_map, check_memory, no_autocast

register("masked_average_pool", "reference", reference.masked_average_pool)
register("update_memory", "reference", reference.update_memory)


def masked_average_pool(
    features: Tensor,  # [B, C, h, w]
    labels: Tensor,  # [B, H, W]
    num_classes: int,
    ignore_index: int = 255,
    normalize: bool = True,
) -> tuple[Tensor, Tensor]:
    """Sum the features of every class, each position weighted by how much of the class it sees.

    With y[b, k, p] the one-hot labels sampled bilinearly (align-corners) at feature position p and
    f^ = f / ||f||_2 over channels:  sums[k] = sum_{b,p} y[b,k,p] f^[b,p],  mass[k] = sum_{b,p} y[b,k,p].

    Args:
        features: ``[B, C, h, w]``, float64, float32, bf16 or fp16, any strides.
        labels: ``[B, H, W]``, any integer dtype, classes ``0..num_classes-1`` or ``ignore_index``.
        num_classes: K.
        ignore_index: label of pixels that belong to no class; they carry no mass.
        normalize: divide each feature by its L2 norm first (a zero feature stays zero).

    Returns:
        ``sums [K, C]`` and ``mass [K]`` (unit: feature positions), float32, or float64 for float64 features.  A class
        without a labelled tap has mass 0 and sums 0.

    Raises:
        ValueError: wrong shape or dtype, or a label outside the range (values and range are named).

    Note:
        Differentiable in ``features`` to any order (reference backend).  Paper, section "memory update"; released
        code ``network/memory.py:206-239``.
    """
    check_map("masked_average_pool", "features", features)
    check_labels("masked_average_pool", labels, features.shape[0], num_classes, ignore_index)
    with no_autocast(features):
        return dispatch("masked_average_pool", features, labels, num_classes, ignore_index, normalize)


def update_memory(
    memory: Tensor,  # [K, C]
    sums: Tensor,  # [K, C]
    mass: Tensor,  # [K]
    momentum: float,
) -> Tensor:
    """Move each slot towards the mean feature of its class.

    new[k] = normalize(momentum * memory[k] + (1 - momentum) * sums[k] / mass[k]) where mass[k] != 0, otherwise
    normalize(memory[k]).  Neither a loop over classes nor a host synchronisation.

    Args:
        memory: ``[K, C]``, the old memory, rows of unit norm or zero.
        sums: ``[K, C]``, class sums of :func:`masked_average_pool`.
        mass: ``[K]``, class masses of the same call.
        momentum: weight of the old memory, in [0, 1] (released: 0.8).

    Returns:
        ``[K, C]``, float32 (float64 if an input is), rows of unit norm; a zero row of an absent class stays zero.

    Raises:
        ValueError: shapes that do not fit, or momentum outside [0, 1].

    Note:
        Differentiable in all three tensors to any order.  Released code ``network/memory.py:234-257``.
    """
    check_memory("update_memory", memory, sums.shape[-1])
    if sums.shape != memory.shape or mass.shape != memory.shape[:1]:
        raise ValueError(
            f"update_memory: sums and mass must be {tuple(memory.shape)} and {tuple(memory.shape[:1])}, "
            f"got {tuple(sums.shape)} and {tuple(mass.shape)}"
        )
    if not 0 <= momentum <= 1:
        raise ValueError(f"update_memory: momentum must lie in [0, 1], got {momentum}")
    with no_autocast(memory):
        return dispatch("update_memory", memory, sums, mass, momentum)
