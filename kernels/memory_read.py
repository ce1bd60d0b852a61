"""memory_read on a GPU: cosine to every slot, softmax, weighted sum of values (formulas: docs/ops/memory_read.md).

Letters: B images, C channels, D channels of the values, K slots, h x w positions.
"""

from __future__ import annotations

from pmm_fast.kernels import memory_pass
from torch import Tensor


def forward(
    features: Tensor, keys: Tensor, values: Tensor, noise: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    """``read [B, D, h, w]`` and ``scores [B, K, h, w]`` from ``keys [K, C]`` and ``values [K, D]``."""
    return memory_pass.forward(features, None, None, keys, values, noise, temperature, 0)[:2]


def backward(
    grad_read: Tensor | None,
    grad_scores: Tensor | None,
    features: Tensor,
    keys: Tensor,
    values: Tensor,
    noise: Tensor | None,
    temperature: float,
    mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of features, keys, values and noise; one that ``mask`` leaves out is empty."""
    maps = (features, None, keys, values, noise)
    return memory_pass.one_backward(grad_read, grad_scores, None, *maps, temperature, 0, mask)


def double_backward(
    grad_grad_features: Tensor | None,
    grad_grad_keys: Tensor | None,
    grad_grad_values: Tensor | None,
    grad_grad_noise: Tensor | None,
    grad_read: Tensor | None,
    grad_scores: Tensor | None,
    features: Tensor,
    keys: Tensor,
    values: Tensor,
    noise: Tensor | None,
    temperature: float,
    mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of grad_read, grad_scores, features, keys, values and noise; as ``mask`` asks."""
    incoming = (grad_grad_features, grad_grad_keys, grad_grad_values, grad_grad_noise)
    maps = (features, None, keys, values, noise)
    of_read, of_scores, _, *rest = memory_pass.one_double_backward(
        *incoming, grad_read, grad_scores, None, *maps, temperature, 0, [*mask[:2], False, *mask[2:]]
    )
    return (of_read, of_scores, *rest)
