"""Mean cross-entropy of bilinearly upsampled logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pmm_fast.ops import reference
from pmm_fast.ops.backends import dispatch, register, register_kernels
from pmm_fast.ops.chain import empty_map, kernels, refuse_third_order
from pmm_fast.ops.checks import check_label_values, check_labels, check_map, no_autocast

_NAME = "upsample_cross_entropy"


def upsample_cross_entropy(
    logits: Tensor,  # [B, K, h, w]
    labels: Tensor,  # [B, H, W]
    ignore_index: int = 255,
    align_corners: bool = True,
) -> Tensor:
    """Upsample logits to the size of the labels and average the cross-entropy over the labelled pixels.

    loss = -1/n sum over pixels with label != ignore_index of log softmax(up(logits))[label], n their number.

    Args:
        logits: ``[B, K, h, w]``, float64, float32, bf16 or fp16, finite (an infinite one has no interpolation: NaN).
        labels: ``[B, H, W]``, any integer dtype, classes ``0..K-1`` or ``ignore_index``.
        ignore_index: label of pixels that do not count.
        align_corners: sampling of ``F.interpolate``; the released networks use True everywhere.

    Returns:
        A scalar, float32 (float64 for float64 logits).  0 with zero gradients when no pixel is labelled or the batch
        is empty.

    Raises:
        ValueError: wrong shape or dtype, or a label outside the range (values and range are named).

    Note:
        Differentiable twice in ``logits`` (reference backend: to any order); a third derivative raises
        ``RuntimeError``.  Formulas: docs/ops/upsample_cross_entropy.md.  Released code ``deepv3plus.py:575-578`` and,
        for the cohesion loss, ``memory.py:172-176``.
    """
    check_map(_NAME, "logits", logits, "[B, K, h, w]")
    check_labels(_NAME, labels, logits.shape[0], logits.shape[1], sampled=False)
    with no_autocast(logits):
        return dispatch(_NAME, logits, labels, ignore_index, align_corners)


# the second output is the number of labelled pixels, which backward divides by


@torch.library.custom_op("pmm_fast::upsample_cross_entropy", mutates_args=())
def _forward(
    logits: Tensor, labels: Tensor, ignore_index: int, align_corners: bool, backend: str
) -> tuple[Tensor, Tensor]:
    if backend == "triton" and labels.device.type == "cpu":
        # an interpreter's; on a GPU the kernel asserts
        check_label_values(_NAME, labels, logits.shape[1], ignore_index)
    return kernels(_NAME, backend).forward(logits, labels, ignore_index, align_corners)


@torch.library.custom_op("pmm_fast::upsample_cross_entropy_backward", mutates_args=())
def _backward(
    grad_loss: Tensor,
    logits: Tensor,
    labels: Tensor,
    count: Tensor,
    ignore_index: int,
    align_corners: bool,
    backend: str,
) -> Tensor:
    return kernels(_NAME, backend).backward(grad_loss, logits, labels, count, ignore_index, align_corners)


@torch.library.custom_op("pmm_fast::upsample_cross_entropy_double_backward", mutates_args=())
def _double_backward(
    grad_grad_logits: Tensor,
    grad_loss: Tensor,
    logits: Tensor,
    labels: Tensor,
    count: Tensor,
    ignore_index: int,
    align_corners: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    function = kernels(_NAME, backend).double_backward
    return function(grad_grad_logits, grad_loss, logits, labels, count, ignore_index, align_corners)


@_forward.register_fake
def _(logits: Tensor, labels: Tensor, ignore_index: int, align_corners: bool, backend: str) -> tuple[Tensor, Tensor]:
    dtype = reference.compute_dtype(logits.dtype)
    return logits.new_empty((), dtype=dtype), logits.new_empty((), dtype=dtype)


@_backward.register_fake
def _(
    grad_loss: Tensor,
    logits: Tensor,
    labels: Tensor,
    count: Tensor,
    ignore_index: int,
    align_corners: bool,
    backend: str,
) -> Tensor:
    return empty_map(logits, logits.shape[1])


@_double_backward.register_fake
def _(
    grad_grad_logits: Tensor,
    grad_loss: Tensor,
    logits: Tensor,
    labels: Tensor,
    count: Tensor,
    ignore_index: int,
    align_corners: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(grad_loss), empty_map(logits, logits.shape[1])


def _save_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, labels, *ctx.options = inputs
    ctx.save_for_backward(logits, labels, output[1])
    ctx.mark_non_differentiable(output[1])


def _differentiate_forward(ctx: Any, grad_loss: Tensor, grad_count: None) -> tuple[Tensor | None, ...]:
    return (_backward(grad_loss, *ctx.saved_tensors, *ctx.options), *(None,) * 4)


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad_loss, logits, labels, count, *ctx.options = inputs
    ctx.save_for_backward(grad_loss, logits, labels, count)


def _differentiate_backward(ctx: Any, grad_grad_logits: Tensor) -> tuple[Tensor | None, ...]:
    grad_grad_loss, grad_logits = _double_backward(grad_grad_logits, *ctx.saved_tensors, *ctx.options)
    return (grad_grad_loss, grad_logits, *(None,) * 5)


_forward.register_autograd(_differentiate_forward, setup_context=_save_forward)
_backward.register_autograd(_differentiate_backward, setup_context=_save_backward)
_double_backward.register_autograd(refuse_third_order(_NAME))


def _call(logits: Tensor, labels: Tensor, ignore_index: int, align_corners: bool, backend: str) -> Tensor:
    return _forward(logits, labels, ignore_index, align_corners, backend)[0]


register(_NAME, "reference", reference.upsample_cross_entropy)
register_kernels(_NAME, _call)
