"""Read and write in one pass over the feature positions."""

from __future__ import annotations

from torch import Tensor

from pmm_fast.ops import reference
from pmm_fast.ops.backends import dispatch, register
from pmm_fast.ops.checks import check_labels, check_map, check_memory, check_noise, no_autocast

register("memory_pass", "reference", reference.memory_pass)


def memory_pass(
    features: Tensor,  # [B, C, h, w]
    written: Tensor,  # [B, C, h, w]
    labels: Tensor,  # [B, H, W]
    memory: Tensor,  # [K, C]
    noise: Tensor | None = None,  # [B, K, h, w]
    temperature: float = 1.0,
    ignore_index: int = 255,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`memory_read` of ``features`` and :func:`masked_average_pool` of ``written``, together.

    The memory is read before it is written: the sums do not enter the read (released code, ``memory.py:196-200``).

    Args:
        features: ``[B, C, h, w]``, what the memory is read with.
        written: ``[B, C, h, w]``, what is pooled: the writing network's output, or ``features`` itself.
        labels: ``[B, H, W]``, any integer dtype, classes ``0..K-1`` or ``ignore_index``.
        memory: ``[K, C]``, rows of unit norm.
        noise: ``[B, K, h, w]`` Gumbel noise or None.
        temperature: of the read's softmax, positive.
        ignore_index: label of pixels that belong to no class.

    Returns:
        ``read [B, C, h, w]``, ``scores [B, K, h, w]``, ``sums [K, C]``, ``mass [K]``, as the two operators return them.

    Raises:
        ValueError: as the two operators do, and when ``written`` is not shaped like ``features``.

    Note:
        Differentiable in ``features``, ``written``, ``memory`` and ``noise`` to any order (reference backend).
    """
    check_map("memory_pass", "features", features)
    check_map("memory_pass", "written", written)
    if written.shape != features.shape:
        raise ValueError(
            f"memory_pass: written must be shaped like features {tuple(features.shape)}, got {tuple(written.shape)}"
        )
    check_memory("memory_pass", memory, features.shape[1])
    check_noise("memory_pass", noise, features, memory.shape[0], temperature)
    check_labels("memory_pass", labels, features.shape[0], memory.shape[0], ignore_index)
    with no_autocast(features):
        return dispatch("memory_pass", features, written, labels, memory, noise, temperature, ignore_index)
