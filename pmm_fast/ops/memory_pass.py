"""Read and write in one pass over the feature positions."""

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
from pmm_fast.ops.checks import (
    check_label_values,
    check_labels,
    check_map,
    check_memory,
    check_noise,
    check_values,
    no_autocast,
)

_NAME = "memory_pass"


def memory_pass(
    features: Tensor,  # [B, C, h, w]
    written: Tensor,  # [B, C, h, w]
    labels: Tensor,  # [B, H, W]
    memory: Tensor,  # [K, C]
    noise: Tensor | None = None,  # [B, K, h, w], or [1] int64: a seed
    temperature: float = 1.0,
    ignore_index: int = 255,
    values: Tensor | None = None,  # [K, D]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`memory_read` of ``features`` and :func:`masked_average_pool` of ``written``, together.

    The memory is read before it is written: the sums do not enter the read (released code, ``memory.py:196-200``).

    Args:
        features: ``[B, C, h, w]``, what the memory is read with.
        written: ``[B, C, h, w]``, what is pooled: the writing network's output; or ``features`` itself (the same
            object), which is then loaded once.
        labels: ``[B, H, W]``, any integer dtype, classes ``0..K-1`` or ``ignore_index``.
        memory: ``[K, C]``, rows of unit norm.
        noise: ``[B, K, h, w]`` Gumbel noise, a seed, or None, as in :func:`memory_read`.
        temperature: of the read's softmax, positive.
        ignore_index: label of pixels that belong to no class.
        values: ``[K, D]``, what is averaged; None for the memory itself.

    Returns:
        ``read [B, D, h, w]``, ``scores [B, K, h, w]``, ``sums [K, C]``, ``mass [K]``, as the two operators return them.

    Raises:
        ValueError: as the two operators do, and when ``written`` is not of the shape and dtype of ``features``.

    Note:
        Differentiable twice in ``features``, ``written``, ``memory``, ``values`` and ``noise`` (reference backend: to
        any order); a third derivative raises ``RuntimeError``.  Formulas: docs/ops/memory_pass.md.
    """
    check_map(_NAME, "features", features)
    check_map(_NAME, "written", written)
    if written.shape != features.shape or written.dtype != features.dtype:
        raise ValueError(
            f"{_NAME}: written must be like features, {tuple(features.shape)} {features.dtype}, "
            f"got {tuple(written.shape)} {written.dtype}"
        )
    check_memory(_NAME, memory, features.shape[1])
    check_noise(_NAME, noise, features, memory.shape[0], temperature)
    check_labels(_NAME, labels, features.shape[0], memory.shape[0])
    check_values(_NAME, values, memory.shape[0])
    with no_autocast(features):
        return dispatch(_NAME, features, written, labels, memory, noise, temperature, ignore_index, values)


# ``written`` None: the features are pooled themselves, and their gradient holds both halves


@torch.library.custom_op("pmm_fast::memory_pass", mutates_args=())
def _forward(
    features: Tensor,
    written: Tensor | None,
    labels: Tensor,
    keys: Tensor,
    values: Tensor,
    noise: Tensor | None,
    temperature: float,
    ignore_index: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if backend == "triton" and labels.device.type == "cpu":
        # an interpreter's; on a GPU the kernel asserts
        check_label_values(_NAME, labels, keys.shape[0], ignore_index)
    function = kernels(_NAME, backend).forward
    return function(features, written, labels, keys, values, noise, temperature, ignore_index)


@torch.library.custom_op("pmm_fast::memory_pass_backward", mutates_args=())
def _backward(
    grad_read: Tensor | None,
    grad_scores: Tensor | None,
    grad_sums: Tensor | None,
    features: Tensor,
    written: Tensor | None,
    labels: Tensor,
    keys: Tensor,
    values: Tensor,
    noise: Tensor | None,
    temperature: float,
    ignore_index: int,
    mask: list[bool],  # gradients wanted: features, written, keys, values, noise
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    function = kernels(_NAME, backend).backward
    maps = (features, written, labels, keys, values, noise)
    return function(grad_read, grad_scores, grad_sums, *maps, temperature, ignore_index, mask)


@torch.library.custom_op("pmm_fast::memory_pass_double_backward", mutates_args=())
def _double_backward(
    grad_grad_features: Tensor | None,
    grad_grad_written: Tensor | None,
    grad_grad_keys: Tensor | None,
    grad_grad_values: Tensor | None,
    grad_grad_noise: Tensor | None,
    grad_read: Tensor | None,
    grad_scores: Tensor | None,
    grad_sums: Tensor | None,
    features: Tensor,
    written: Tensor | None,
    labels: Tensor,
    keys: Tensor,
    values: Tensor,
    noise: Tensor | None,
    temperature: float,
    ignore_index: int,
    mask: list[bool],  # wanted: grad_read, grad_scores, grad_sums, features, written, keys, values, noise
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    function = kernels(_NAME, backend).double_backward
    incoming = (grad_grad_features, grad_grad_written, grad_grad_keys, grad_grad_values, grad_grad_noise)
    maps = (features, written, labels, keys, values, noise)
    return function(*incoming, grad_read, grad_scores, grad_sums, *maps, temperature, ignore_index, mask)


@_forward.register_fake
def _(
    features: Tensor,
    written: Tensor | None,
    labels: Tensor,
    keys: Tensor,
    values: Tensor,
    noise: Tensor | None,
    temperature: float,
    ignore_index: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, channels, height, width = features.shape
    return (
        empty_map(features, values.shape[1]),
        keys.new_empty((batch, keys.shape[0], height, width)),
        keys.new_empty((keys.shape[0], channels)),
        keys.new_empty((keys.shape[0],)),
    )


@_backward.register_fake
def _(
    grad_read: Tensor | None,
    grad_scores: Tensor | None,
    grad_sums: Tensor | None,
    features: Tensor,
    written: Tensor | None,
    labels: Tensor,
    keys: Tensor,
    values: Tensor,
    noise: Tensor | None,
    temperature: float,
    ignore_index: int,
    mask: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    channels = features.shape[1]
    return (
        empty_map_if(mask[0], features, features, channels),
        empty_map_if(mask[1], written, features, channels),
        empty_if(mask[2], keys),
        empty_if(mask[3], values),
        empty_noise_gradient(mask[4], noise, features),
    )


@_double_backward.register_fake
def _(
    grad_grad_features: Tensor | None,
    grad_grad_written: Tensor | None,
    grad_grad_keys: Tensor | None,
    grad_grad_values: Tensor | None,
    grad_grad_noise: Tensor | None,
    grad_read: Tensor | None,
    grad_scores: Tensor | None,
    grad_sums: Tensor | None,
    features: Tensor,
    written: Tensor | None,
    labels: Tensor,
    keys: Tensor,
    values: Tensor,
    noise: Tensor | None,
    temperature: float,
    ignore_index: int,
    mask: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, channels, height, width = features.shape
    return (
        empty_map_if(mask[0], features, features, values.shape[1]),
        keys.new_empty((batch, keys.shape[0], height, width) if mask[1] else (0,)),
        empty_if(mask[2], keys),
        empty_map_if(mask[3], features, features, channels),
        empty_map_if(mask[4], written, features, channels),
        empty_if(mask[5], keys),
        empty_if(mask[6], values),
        empty_noise_gradient(mask[7], noise, features),
    )


def _save_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, temperature, ignore_index, ctx.backend = inputs
    ctx.save_for_backward(*tensors)
    ctx.options = (temperature, ignore_index)
    ctx.mark_non_differentiable(output[3])
    ctx.set_materialize_grads(False)


def _differentiate_forward(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
    features, written, _, keys, values, noise = ctx.needs_input_grad[:6]
    mask = [features, written, keys, values, noise]
    *grads_out, _ = incoming
    if all(grad is None for grad in grads_out):
        return (None,) * 9
    grads = _backward(*grads_out, *ctx.saved_tensors, *ctx.options, mask, ctx.backend)
    of_features, of_written, *of_memory = map(wanted, grads, mask)
    return (of_features, of_written, None, *of_memory, None, None, None)


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, temperature, ignore_index, ctx.given, ctx.backend = inputs
    ctx.save_for_backward(*tensors)
    ctx.options = (temperature, ignore_index)
    ctx.set_materialize_grads(False)


def _differentiate_backward(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad
    mask = [*needs[:5], *needs[6:9]]
    incoming = tuple(map(wanted, incoming, ctx.given))
    if all(grad is None for grad in incoming):
        return (None,) * 13
    grads = _double_backward(*incoming, *ctx.saved_tensors, *ctx.options, mask, ctx.backend)
    *before_labels, keys, values, noise = map(wanted, grads, mask)
    return (*before_labels, None, keys, values, noise, None, None, None, None)


_forward.register_autograd(_differentiate_forward, setup_context=_save_forward)
_backward.register_autograd(_differentiate_backward, setup_context=_save_backward)
_double_backward.register_autograd(refuse_third_order(_NAME))


def _call(
    features: Tensor,
    written: Tensor,
    labels: Tensor,
    memory: Tensor,
    noise: Tensor | None,
    temperature: float,
    ignore_index: int,
    values: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    keys, values, noise = reference.to_compute_dtype(features, memory, values, noise)
    other = None if written is features else written
    return _forward(features, other, labels, keys, values, noise, temperature, ignore_index, backend)


register(_NAME, "reference", reference.memory_pass)
register_kernels(_NAME, _call)
