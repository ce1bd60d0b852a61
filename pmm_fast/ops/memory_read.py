"""Reading the memory: cosine similarity, (Gumbel) softmax over slots, weighted sum of slots."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pmm_fast.ops import reference
from pmm_fast.ops.backends import dispatch, register, register_kernels
from pmm_fast.ops.chain import (
    empty_if,
    empty_map,
    empty_map_if,
    empty_noise_gradient,
    kernels,
    refuse_third_order,
    wanted,
)
from pmm_fast.ops.checks import check_map, check_memory, check_noise, check_values, no_autocast

_NAME = "memory_read"


def memory_read(
    features: Tensor,  # [B, C, h, w]
    memory: Tensor,  # [K, C]
    noise: Tensor | None = None,  # [B, K, h, w], or [1] int64: a seed
    temperature: float = 1.0,
    values: Tensor | None = None,  # [K, D]
) -> tuple[Tensor, Tensor]:
    """For each position, the slots averaged by their similarity to its feature.

    scores = f^ M^T with f^ = f / ||f||_2;  W = softmax((scores + noise) / temperature) over slots;  read = W M.

    Args:
        features: ``[B, C, h, w]``, float64, float32, bf16 or fp16, any strides.
        memory: ``[K, C]``, rows of unit norm (they are not normalised again).
        noise: ``[B, K, h, w]`` Gumbel noise (:func:`gumbel_noise`); or an int64 tensor of one element, a seed from
            which every backend draws the noise of :func:`seeded_gumbel_noise` without storing it; or None for the
            plain softmax.
        temperature: of the softmax, positive.
        values: ``[K, D]``, what is averaged; None for the memory itself.  The memory projected beforehand, for one.

    Returns:
        ``read [B, D, h, w]`` in the dtype of ``features``, and ``scores [B, K, h, w]``, the cosines without noise or
        temperature, float32 (float64 for float64 features).

    Raises:
        ValueError: shapes or dtypes that do not fit, or a temperature that is not positive.

    Note:
        Differentiable twice in ``features``, ``memory``, ``values`` and ``noise`` (reference backend: to any order); a
        third derivative raises ``RuntimeError``.  Formulas: docs/ops/memory_read.md.  Released code
        ``network/memory.py:167-189, 317-336``.
    """
    check_map(_NAME, "features", features)
    check_memory(_NAME, memory, features.shape[1])
    check_noise(_NAME, noise, features, memory.shape[0], temperature)
    check_values(_NAME, values, memory.shape[0])
    with no_autocast(features):
        return dispatch(_NAME, features, memory, noise, temperature, values)


@torch.library.custom_op("pmm_fast::memory_read", mutates_args=())
def _forward(
    features: Tensor, keys: Tensor, values: Tensor, noise: Tensor | None, temperature: float, backend: str
) -> tuple[Tensor, Tensor]:
    return kernels(_NAME, backend).forward(features, keys, values, noise, temperature)


@torch.library.custom_op("pmm_fast::memory_read_backward", mutates_args=())
def _backward(
    grad_read: Tensor | None,
    grad_scores: Tensor | None,
    features: Tensor,
    keys: Tensor,
    values: Tensor,
    noise: Tensor | None,
    temperature: float,
    mask: list[bool],  # gradients wanted: features, keys, values, noise
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    function = kernels(_NAME, backend).backward
    return function(grad_read, grad_scores, features, keys, values, noise, temperature, mask)


@torch.library.custom_op("pmm_fast::memory_read_double_backward", mutates_args=())
def _double_backward(
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
    mask: list[bool],  # gradients wanted: grad_read, grad_scores, features, keys, values, noise
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    function = kernels(_NAME, backend).double_backward
    incoming = (grad_grad_features, grad_grad_keys, grad_grad_values, grad_grad_noise)
    return function(*incoming, grad_read, grad_scores, features, keys, values, noise, temperature, mask)


@_forward.register_fake
def _(
    features: Tensor, keys: Tensor, values: Tensor, noise: Tensor | None, temperature: float, backend: str
) -> tuple[Tensor, Tensor]:
    batch, _, height, width = features.shape
    scores = keys.new_empty((batch, keys.shape[0], height, width))
    return empty_map(features, values.shape[1]), scores


@_backward.register_fake
def _(
    grad_read: Tensor | None,
    grad_scores: Tensor | None,
    features: Tensor,
    keys: Tensor,
    values: Tensor,
    noise: Tensor | None,
    temperature: float,
    mask: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        empty_map_if(mask[0], features, features, features.shape[1]),
        empty_if(mask[1], keys),
        empty_if(mask[2], values),
        empty_noise_gradient(mask[3], noise, features),
    )


@_double_backward.register_fake
def _(
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, channels, height, width = features.shape
    return (
        empty_map_if(mask[0], features, features, values.shape[1]),
        keys.new_empty((batch, keys.shape[0], height, width) if mask[1] else (0,)),
        empty_map_if(mask[2], features, features, channels),
        empty_if(mask[3], keys),
        empty_if(mask[4], values),
        empty_noise_gradient(mask[5], noise, features),
    )


def _save_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.temperature, ctx.backend = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _differentiate_forward(ctx: Any, grad_read: Tensor | None, grad_scores: Tensor | None) -> tuple[Tensor | None, ...]:
    mask = list(ctx.needs_input_grad[:4])
    if grad_read is None and grad_scores is None:
        return (None,) * 6
    grads = _backward(grad_read, grad_scores, *ctx.saved_tensors, ctx.temperature, mask, ctx.backend)
    return (*map(wanted, grads, mask), None, None)


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.temperature, ctx.given, ctx.backend = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _differentiate_backward(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
    mask = list(ctx.needs_input_grad[:6])
    incoming = tuple(map(wanted, incoming, ctx.given))
    if all(grad is None for grad in incoming):
        return (None,) * 9
    grads = _double_backward(*incoming, *ctx.saved_tensors, ctx.temperature, mask, ctx.backend)
    return (*map(wanted, grads, mask), None, None, None)


_forward.register_autograd(_differentiate_forward, setup_context=_save_forward)
_backward.register_autograd(_differentiate_backward, setup_context=_save_backward)
_double_backward.register_autograd(refuse_third_order(_NAME))


def _call(
    features: Tensor, memory: Tensor, noise: Tensor | None, temperature: float, values: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    keys, values, noise = reference.to_compute_dtype(features, memory, values, noise)
    return _forward(features, keys, values, noise, temperature, backend)


register(_NAME, "reference", reference.memory_read)
register_kernels(_NAME, _call)


def gumbel_noise(
    shape: tuple[int, ...],
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Independent standard Gumbel noise, -log(e) with e exponential: argmax(scores + noise) samples the softmax."""
    return -torch.empty(shape, device=device, dtype=dtype).exponential_(generator=generator).log()
