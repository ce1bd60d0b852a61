"""Reading the memory: cosine similarity, (Gumbel) softmax over slots, weighted sum of slots."""

from __future__ import annotations

import torch
from torch import Tensor

from pmm_fast.ops import reference
from pmm_fast.ops.backends import dispatch, register
from pmm_fast.ops.checks import check_map, check_memory, check_noise, no_autocast

register("memory_read", "reference", reference.memory_read)


def memory_read(
    features: Tensor,  # [B, C, h, w]
    memory: Tensor,  # [K, C]
    noise: Tensor | None = None,  # [B, K, h, w]
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """For each position, the slots averaged by their similarity to its feature.

    scores = f^ M^T with f^ = f / ||f||_2;  W = softmax((scores + noise) / temperature) over slots;  read = W M.

    Args:
        features: ``[B, C, h, w]``, float64, float32, bf16 or fp16, any strides.
        memory: ``[K, C]``, rows of unit norm (they are not normalised again).
        noise: ``[B, K, h, w]`` Gumbel noise (:func:`gumbel_noise`), or None for the plain softmax.
        temperature: of the softmax, positive.

    Returns:
        ``read [B, C, h, w]`` in the dtype of ``features``, and ``scores [B, K, h, w]``, the cosines without noise or
        temperature, float32 (float64 for float64 features).

    Raises:
        ValueError: shapes or dtypes that do not fit, or a temperature that is not positive.

    Note:
        Differentiable in ``features``, ``memory`` and ``noise`` to any order (reference backend).  Released code
        ``network/memory.py:167-189, 317-336``.
    """
    check_map("memory_read", "features", features)
    check_memory("memory_read", memory, features.shape[1])
    check_noise("memory_read", noise, features, memory.shape[0], temperature)
    with no_autocast(features):
        return dispatch("memory_read", features, memory, noise, temperature)


def gumbel_noise(
    shape: tuple[int, ...],
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Independent standard Gumbel noise, -log(e) with e exponential: argmax(scores + noise) samples the softmax."""
    return -torch.empty(shape, device=device, dtype=dtype).exponential_(generator=generator).log()
