"""masked_average_pool on a GPU: class sums of normalised features (formulas: docs/ops/masked_average_pool.md).

Letters: B images, C channels, K classes, h x w positions, H x W label pixels.
"""

from __future__ import annotations

import torch
from pmm_fast.kernels._common import as_labels, as_map, empty_map
from pmm_fast.kernels._launch import measure, outer, pool, visit
from pmm_fast.kernels._walk import backward_kernel, double_backward_kernel
from torch import Tensor


def forward(
    features: Tensor, labels: Tensor, num_classes: int, ignore_index: int, normalize: bool
) -> tuple[Tensor, Tensor]:
    """``sums [K, C]`` and ``mass [K]`` of ``features [B, C, h, w]`` and ``labels [B, H, W]``."""
    sizes = measure(features, num_classes, None, labels)
    return pool(sizes, features, as_labels(labels, ignore_index), normalize)


def backward(grad_sums: Tensor, features: Tensor, labels: Tensor, ignore_index: int, normalize: bool) -> Tensor:
    """The gradient of ``features`` from ``grad_sums [K, C]``."""
    sizes = measure(features, grad_sums.shape[0], None, labels)
    grad_features = empty_map(features, features.shape[1])
    read = as_map(features) if normalize else None
    incoming = (None, None, grad_sums.contiguous(), read, as_labels(labels, ignore_index))
    visit(backward_kernel, sizes, *incoming, None, None, None, as_map(grad_features), None, None, None)
    return grad_features


def double_backward(
    grad_grad_features: Tensor,
    grad_sums: Tensor,
    features: Tensor,
    labels: Tensor,
    ignore_index: int,
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of ``grad_sums`` and ``features`` from that of :func:`backward`'s result."""
    if not normalize:
        # backward does not see the features, and is the transpose of forward
        sums, _ = forward(grad_grad_features, labels, grad_sums.shape[0], ignore_index, False)
        return sums, empty_map(features, features.shape[1]).zero_()
    sizes = measure(features, grad_sums.shape[0], None, labels)
    # what the gradient of the sums is summed with, beside the incoming gradient and the features
    for_sums = sizes.slots_map(), sizes.slots_map()
    for_features = empty_map(features, features.shape[1])
    incoming = (as_map(grad_grad_features), *(None,) * 5, grad_sums.contiguous())
    saved = (as_map(features), as_labels(labels, ignore_index), None, None, None)
    outputs = (None, None, as_map(for_features), None, None, None, None, *map(as_map, for_sums))
    visit(double_backward_kernel, sizes, *incoming, *saved, *outputs)
    total, _ = outer(sizes, (for_sums[0], grad_grad_features), (for_sums[1], features), (None, None))
    return torch.zeros_like(grad_sums) if total is None else total, for_features
