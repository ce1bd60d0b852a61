"""masked_average_pool on CUDA: the kernels of memory_pass with the read compiled out.

Features may have any strides that ``pmm_fast.ops.cuda`` takes; gradients have the layout of ``features``.

B images, C channels, K classes, h x w positions, H x W label pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pmm_fast.ops import cuda
from pmm_fast.ops.chain import empty_map
from pmm_fast.ops.reference import compute_dtype

_NAME = "masked_average_pool"


def forward(
    features: Tensor, labels: Tensor, num_classes: int, ignore_index: int, normalize: bool
) -> tuple[Tensor, Tensor]:
    """Class sums ``[K, C]`` and masses ``[K]``."""
    dtype = compute_dtype(features.dtype)
    sums = features.new_empty((num_classes, features.shape[1]), dtype=dtype)
    mass = features.new_empty((num_classes,), dtype=dtype)
    call = cuda.memory_call(features, num_classes)
    cuda.add_pool(call, labels, ignore_index, normalize)
    call.address("out_sums", sums)
    call.address("out_mass", mass)
    call.run(_NAME, cuda.FORWARD)
    return sums, mass


def backward(grad_sums: Tensor, features: Tensor, labels: Tensor, ignore_index: int, normalize: bool) -> Tensor:
    """The gradient of ``features``."""
    grad_features = empty_map(features, features.shape[1])
    call = cuda.memory_call(features, grad_sums.shape[0])
    cuda.add_pool(call, labels, ignore_index, normalize)
    call.matrix("grad_sums", grad_sums)
    call.map("out_features", grad_features)
    call.run(_NAME, cuda.BACKWARD)
    return grad_features


def double_backward(
    grad_grad_features: Tensor,
    grad_sums: Tensor,
    features: Tensor,
    labels: Tensor,
    ignore_index: int,
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of ``grad_sums`` and ``features`` where ``grad_grad_features`` is that of backward's result."""
    of_sums = torch.empty_like(grad_sums, memory_format=torch.contiguous_format)
    of_features = empty_map(features, features.shape[1])
    call = cuda.memory_call(features, grad_sums.shape[0])
    cuda.add_pool(call, labels, ignore_index, normalize)
    call.matrix("grad_sums", grad_sums)
    call.map("grad_grad_features", grad_grad_features)
    call.address("out_sums", of_sums)
    call.map("out_features", of_features)
    call.run(_NAME, cuda.DOUBLE_BACKWARD)
    return of_sums, of_features
