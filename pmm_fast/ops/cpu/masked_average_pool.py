"""masked_average_pool on the CPU: the pass without its read.  Formulas: docs/ops/masked_average_pool.md."""

from __future__ import annotations

import torch
from torch import Tensor

from pmm_fast.ops.chain import empty_map
from pmm_fast.ops.cpu import readable_labels, run_pass
from pmm_fast.ops.reference import compute_dtype

_NAME = "masked_average_pool"


def forward(
    features: Tensor, labels: Tensor, num_classes: int, ignore_index: int, normalize: bool
) -> tuple[Tensor, Tensor]:
    """``sums [K, C]`` and ``mass [K]``."""
    dtype = compute_dtype(features.dtype)
    sums = features.new_empty((num_classes, features.shape[1]), dtype=dtype)
    mass = features.new_empty((num_classes,), dtype=dtype)
    results: dict[str, Tensor | None] = {"sums_out": sums, "mass_out": mass}
    labels = readable_labels(labels)
    run_pass(_NAME, 0, features, labels, num_classes, 0, ignore_index, matrices=results, normalize=normalize)
    return sums, mass


def backward(grad_sums: Tensor, features: Tensor, labels: Tensor, ignore_index: int, normalize: bool) -> Tensor:
    """The gradient of the features."""
    out = empty_map(features, features.shape[1])
    maps: dict[str, Tensor | None] = {"features_out": out}
    matrices: dict[str, Tensor | None] = {"grad_sums": grad_sums}
    labels, classes = readable_labels(labels), grad_sums.shape[0]
    run_pass(_NAME, 1, features, labels, classes, 0, ignore_index, maps, matrices, normalize=normalize)
    return out


def double_backward(
    grad_grad_features: Tensor,
    grad_sums: Tensor,
    features: Tensor,
    labels: Tensor,
    ignore_index: int,
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of ``grad_sums`` and of the features."""
    sums = torch.empty_like(grad_sums, memory_format=torch.contiguous_format)
    out = empty_map(features, features.shape[1])
    maps: dict[str, Tensor | None] = {"grad_grad_features": grad_grad_features, "features_out": out}
    matrices: dict[str, Tensor | None] = {"grad_sums": grad_sums, "sums_out": sums}
    labels, classes = readable_labels(labels), grad_sums.shape[0]
    run_pass(_NAME, 2, features, labels, classes, 0, ignore_index, maps, matrices, normalize=normalize)
    return sums, out
