"""memory_read on the CPU: the pass without its pool.  Formulas: docs/ops/memory_read.md."""

from __future__ import annotations

from torch import Tensor

from pmm_fast.ops.cpu import memory_pass

_NAME = "memory_read"
_NO_LABELS = None


def forward(
    features: Tensor, keys: Tensor, values: Tensor, noise: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    """``read [B, D, h, w]`` and ``scores [B, K, h, w]``."""
    read, scores, *_ = memory_pass.forward(features, None, _NO_LABELS, keys, values, noise, temperature, 0, _NAME)
    return read, scores


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
    """The gradients of features, keys, values and noise; empty where ``mask`` does not ask for them."""
    wanted = [mask[0], False, *mask[1:]]
    incoming = (grad_read, grad_scores, None)
    of_features, _, of_keys, of_values, of_noise = memory_pass.backward(
        *incoming, features, None, _NO_LABELS, keys, values, noise, temperature, 0, wanted, _NAME
    )
    return of_features, of_keys, of_values, of_noise


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
    """The gradients of grad_read, grad_scores, features, keys, values and noise; empty where not asked for."""
    incoming = (grad_grad_features, None, grad_grad_keys, grad_grad_values, grad_grad_noise)
    memory = (keys, values, noise, temperature)
    wanted = [mask[0], mask[1], False, mask[2], False, *mask[3:]]
    of_read, of_scores, _, of_features, _, of_keys, of_values, of_noise = memory_pass.double_backward(
        *incoming, grad_read, grad_scores, None, features, None, _NO_LABELS, *memory, 0, wanted, _NAME
    )
    return of_read, of_scores, of_features, of_keys, of_values, of_noise
