"""Mean cross-entropy of bilinearly upsampled logits."""

from __future__ import annotations

from torch import Tensor

from pmm_fast.ops import reference
from pmm_fast.ops.backends import dispatch, register
from pmm_fast.ops.checks import check_labels, check_map, no_autocast

register("upsample_cross_entropy", "reference", reference.upsample_cross_entropy)


def upsample_cross_entropy(
    logits: Tensor,  # [B, K, h, w]
    labels: Tensor,  # [B, H, W]
    ignore_index: int = 255,
    align_corners: bool = True,
) -> Tensor:
    """Upsample logits to the size of the labels and average the cross-entropy over the labelled pixels.

    loss = -1/n sum over pixels with label != ignore_index of log softmax(up(logits))[label], n their number.

    Args:
        logits: ``[B, K, h, w]``, float64, float32, bf16 or fp16.
        labels: ``[B, H, W]``, any integer dtype, classes ``0..K-1`` or ``ignore_index``.
        ignore_index: label of pixels that do not count.
        align_corners: sampling of ``F.interpolate``; the released networks use True everywhere.

    Returns:
        A scalar, float32 (float64 for float64 logits).  0 with zero gradients when no pixel is labelled or the batch
        is empty.

    Raises:
        ValueError: wrong shape or dtype, or a label outside the range (values and range are named).

    Note:
        Differentiable in ``logits`` to any order (reference backend).  Released code ``deepv3plus.py:575-578`` and,
        for the cohesion loss, ``memory.py:172-176``.
    """
    check_map("upsample_cross_entropy", "logits", logits, "[B, K, h, w]")
    check_labels("upsample_cross_entropy", labels, logits.shape[0], logits.shape[1], ignore_index)
    with no_autocast(logits):
        return dispatch("upsample_cross_entropy", logits, labels, ignore_index, align_corners)
