"""Masked average pooling over all classes at once, and the memory update made from it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pmm_fast.ops import reference
from pmm_fast.ops.backends import dispatch, register, register_kernels
from pmm_fast.ops.chain import empty_map, kernels, refuse_third_order
from pmm_fast.ops.checks import check_label_values, check_labels, check_map, check_memory, no_autocast

_NAME = "masked_average_pool"


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
        ValueError: wrong shape or dtype, or a label outside the range (values and range are named; kernels look at
            the pixels that the sampling touches, the reference at all).

    Note:
        Differentiable twice in ``features`` (reference backend: to any order); a third derivative raises
        ``RuntimeError``.  Formulas: docs/ops/masked_average_pool.md.  Paper, section "memory update"; released code
        ``network/memory.py:206-239``.
    """
    check_map(_NAME, "features", features)
    check_labels(_NAME, labels, features.shape[0], num_classes)
    with no_autocast(features):
        return dispatch(_NAME, features, labels, num_classes, ignore_index, normalize)


@torch.library.custom_op("pmm_fast::masked_average_pool", mutates_args=())
def _forward(
    features: Tensor, labels: Tensor, num_classes: int, ignore_index: int, normalize: bool, backend: str
) -> tuple[Tensor, Tensor]:
    if backend == "triton" and labels.device.type == "cpu":
        # an interpreter's; on a GPU the kernel asserts
        check_label_values(_NAME, labels, num_classes, ignore_index)
    return kernels(_NAME, backend).forward(features, labels, num_classes, ignore_index, normalize)


@torch.library.custom_op("pmm_fast::masked_average_pool_backward", mutates_args=())
def _backward(
    grad_sums: Tensor, features: Tensor, labels: Tensor, ignore_index: int, normalize: bool, backend: str
) -> Tensor:
    return kernels(_NAME, backend).backward(grad_sums, features, labels, ignore_index, normalize)


@torch.library.custom_op("pmm_fast::masked_average_pool_double_backward", mutates_args=())
def _double_backward(
    grad_grad_features: Tensor,
    grad_sums: Tensor,
    features: Tensor,
    labels: Tensor,
    ignore_index: int,
    normalize: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    function = kernels(_NAME, backend).double_backward
    return function(grad_grad_features, grad_sums, features, labels, ignore_index, normalize)


@_forward.register_fake
def _(
    features: Tensor, labels: Tensor, num_classes: int, ignore_index: int, normalize: bool, backend: str
) -> tuple[Tensor, Tensor]:
    dtype = reference.compute_dtype(features.dtype)
    return (
        features.new_empty((num_classes, features.shape[1]), dtype=dtype),
        features.new_empty((num_classes,), dtype=dtype),
    )


@_backward.register_fake
def _(grad_sums: Tensor, features: Tensor, labels: Tensor, ignore_index: int, normalize: bool, backend: str) -> Tensor:
    return empty_map(features, features.shape[1])


@_double_backward.register_fake
def _(
    grad_grad_features: Tensor,
    grad_sums: Tensor,
    features: Tensor,
    labels: Tensor,
    ignore_index: int,
    normalize: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(grad_sums, memory_format=torch.contiguous_format), empty_map(features, features.shape[1])


def _save_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    features, labels, _, *ctx.options = inputs
    ctx.save_for_backward(features, labels)
    ctx.mark_non_differentiable(output[1])


def _differentiate_forward(ctx: Any, grad_sums: Tensor, grad_mass: None) -> tuple[Tensor | None, ...]:
    features, labels = ctx.saved_tensors
    return (_backward(grad_sums, features, labels, *ctx.options), *(None,) * 5)


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad_sums, features, labels, *ctx.options = inputs
    ctx.save_for_backward(grad_sums, features, labels)


def _differentiate_backward(ctx: Any, grad_grad_features: Tensor) -> tuple[Tensor | None, ...]:
    return (*_double_backward(grad_grad_features, *ctx.saved_tensors, *ctx.options), *(None,) * 4)


_forward.register_autograd(_differentiate_forward, setup_context=_save_forward)
_backward.register_autograd(_differentiate_backward, setup_context=_save_backward)
_double_backward.register_autograd(refuse_third_order(_NAME))

register(_NAME, "reference", reference.masked_average_pool)
register_kernels(_NAME, _forward)


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
        Differentiable in all three tensors to any order.  K x C numbers: plain PyTorch, whatever the backend.  Released
        code ``network/memory.py:234-257``.
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
        return reference.update_memory(memory, sums, mass, momentum)
