"""upsample_cross_entropy on CUDA.

Logits and incoming gradients may have any strides that ``pmm_fast.ops.cuda`` takes; gradients have the layout of the
logits.

B images, K classes, h x w logits, H x W label pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pmm_fast.ops import cuda
from pmm_fast.ops.chain import empty_map
from pmm_fast.ops.reference import compute_dtype

_NAME = "upsample_cross_entropy"


def _is_empty(logits: Tensor, labels: Tensor) -> bool:
    return logits.numel() == 0 or labels.numel() == 0


def _call(logits: Tensor, labels: Tensor, ignore_index: int, align_corners: bool) -> cuda.Call:
    call = cuda.Call(logits, logits.shape[1], "Upsample")
    call.set("align_corners", align_corners)
    call.map("logits", logits)
    call.labels(labels, ignore_index)
    return call


def forward(logits: Tensor, labels: Tensor, ignore_index: int, align_corners: bool) -> tuple[Tensor, Tensor]:
    """The loss and the number of labelled pixels, at least 1."""
    dtype = compute_dtype(logits.dtype)
    if _is_empty(logits, labels):
        return logits.new_zeros((), dtype=dtype), logits.new_ones((), dtype=dtype)
    loss, count = logits.new_empty((), dtype=dtype), logits.new_empty((), dtype=dtype)
    call = _call(logits, labels, ignore_index, align_corners)
    call.address("out_loss", loss)
    call.address("count", count)
    call.run(_NAME, cuda.FORWARD)
    return loss, count


def backward(
    grad_loss: Tensor, logits: Tensor, labels: Tensor, count: Tensor, ignore_index: int, align_corners: bool
) -> Tensor:
    """The gradient of the logits."""
    grad_logits = empty_map(logits, logits.shape[1])
    if _is_empty(logits, labels):
        return grad_logits.zero_()
    call = _call(logits, labels, ignore_index, align_corners)
    call.address("grad_loss", grad_loss)
    call.address("count", count)
    call.map("out_logits", grad_logits)
    call.run(_NAME, cuda.BACKWARD)
    return grad_logits


def double_backward(
    grad_grad_logits: Tensor,
    grad_loss: Tensor,
    logits: Tensor,
    labels: Tensor,
    count: Tensor,
    ignore_index: int,
    align_corners: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of ``grad_loss`` and of the logits where ``grad_grad_logits`` is that of backward's result."""
    of_loss, of_logits = torch.empty_like(grad_loss), empty_map(logits, logits.shape[1])
    if _is_empty(logits, labels):
        return of_loss.zero_(), of_logits.zero_()
    call = _call(logits, labels, ignore_index, align_corners)
    call.address("grad_loss", grad_loss)
    call.address("count", count)
    call.map("grad_grad_logits", grad_grad_logits)
    call.address("out_loss", of_loss)
    call.map("out_logits", of_logits)
    call.run(_NAME, cuda.DOUBLE_BACKWARD)
    return of_loss, of_logits
