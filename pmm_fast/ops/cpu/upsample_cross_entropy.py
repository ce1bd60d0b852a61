"""upsample_cross_entropy on the CPU.  Formulas: docs/ops/upsample_cross_entropy.md."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pmm_fast.ops.chain import empty_map
from pmm_fast.ops.cpu import common, map_of, matrix_of, readable_labels, run
from pmm_fast.ops.reference import compute_dtype

_NAME = "upsample_cross_entropy"


def _run(order: int, logits: Tensor, labels: Tensor, ignore_index: int, align_corners: bool, **fields: Any) -> None:
    labels, classes = readable_labels(labels), logits.shape[1]
    fields |= common(logits, labels) | {"order": order, "classes": classes, "logits": map_of(logits)}
    fields |= {"ignore_index": ignore_index, "align_corners": align_corners}
    run(_NAME, "upsample_cross_entropy", "loss_workspace", labels, classes, ignore_index, fields)


def _is_empty(logits: Tensor, labels: Tensor) -> bool:
    return logits.numel() == 0 or labels.numel() == 0


def forward(logits: Tensor, labels: Tensor, ignore_index: int, align_corners: bool) -> tuple[Tensor, Tensor]:
    """The loss and the number of labelled pixels, at least 1."""
    dtype = compute_dtype(logits.dtype)
    if _is_empty(logits, labels):
        return logits.new_zeros((), dtype=dtype), logits.new_ones((), dtype=dtype)
    loss, count = logits.new_empty((), dtype=dtype), logits.new_empty((), dtype=dtype)
    results = {"loss_out": matrix_of(loss), "count_out": matrix_of(count)}
    _run(0, logits, labels, ignore_index, align_corners, **results)
    return loss, count


def backward(
    grad_loss: Tensor, logits: Tensor, labels: Tensor, count: Tensor, ignore_index: int, align_corners: bool
) -> Tensor:
    """The gradient of the logits."""
    out = empty_map(logits, logits.shape[1])
    if _is_empty(logits, labels):
        return out.zero_()
    fields = {"grad_loss": matrix_of(grad_loss), "count": matrix_of(count), "logits_out": map_of(out)}
    _run(1, logits, labels, ignore_index, align_corners, **fields)
    return out


def double_backward(
    grad_grad_logits: Tensor,
    grad_loss: Tensor,
    logits: Tensor,
    labels: Tensor,
    count: Tensor,
    ignore_index: int,
    align_corners: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of ``grad_loss`` and of the logits."""
    of_loss, out = torch.empty_like(grad_loss), empty_map(logits, logits.shape[1])
    if _is_empty(logits, labels):
        return of_loss.zero_(), out.zero_()
    fields = {"grad_loss": matrix_of(grad_loss), "count": matrix_of(count), "logits_out": map_of(out)}
    fields |= {"grad_grad_logits": map_of(grad_grad_logits), "loss_out": matrix_of(of_loss)}
    _run(2, logits, labels, ignore_index, align_corners, **fields)
    return of_loss, out
