"""memory_pass on a GPU: the read of features and the pool of written features in one walk (docs/ops/memory_pass.md).

Letters: B images, C channels, D channels of the values, K slots or classes, h x w positions, H x W label pixels.
"""

from __future__ import annotations

import torch
from pmm_fast.kernels import masked_average_pool
from pmm_fast.kernels._common import Map, as_labels, as_map, empty_map
from pmm_fast.kernels._launch import Sizes, as_memory, measure, outer, pool, visit
from pmm_fast.kernels._walk import backward_kernel, double_backward_kernel, read_kernel
from torch import Tensor


def forward(
    features: Tensor,
    written: Tensor | None,
    labels: Tensor | None,
    keys: Tensor,
    values: Tensor,
    noise: Tensor | None,
    temperature: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``read [B, D, h, w]``, ``scores [B, K, h, w]``, ``sums [K, C]`` and ``mass [K]``.

    One kernel does both where the same features are read and pooled; two tensors share no data, and take one each.

    Args:
        written: what is pooled; None: the features themselves.
        labels: None: nothing is pooled, and sums and mass are empty.
    """
    sizes = measure(features, len(keys), values, labels)
    read = empty_map(features, values.shape[1])
    scores = keys.new_empty((features.shape[0], len(keys), *features.shape[2:]))
    reading = (*as_memory(keys, values, noise, temperature), as_map(read), as_map(scores))
    if labels is not None and written is None:
        return read, scores, *pool(sizes, features, as_labels(labels, ignore_index), True, reading)
    visit(read_kernel, sizes, as_map(features), *reading)
    if labels is None:
        return read, scores, keys.new_empty((0,)), keys.new_empty((0,))
    return read, scores, *pool(sizes, written, as_labels(labels, ignore_index), True)


def _wanted_map(wanted: bool, like: Tensor, channels: int) -> tuple[Tensor, Map | None]:
    """A fresh gradient like the features, and how a kernel takes it; empty and None where it is not wanted."""
    if not wanted:
        return like.new_empty((0,)), None
    gradient = empty_map(like, channels)
    return gradient, as_map(gradient)


def _wanted_slots(wanted: bool, sizes: Sizes, keys: Tensor) -> tuple[Tensor, Map | None]:
    """A fresh gradient ``[B, K, h, w]`` of scores or noise, likewise."""
    if not wanted:
        return keys.new_empty((0,)), None
    gradient = sizes.slots_map()
    return gradient, as_map(gradient)


def _sum_or_zeros(wanted: bool, total: Tensor | None, like: Tensor) -> Tensor:
    """A gradient like ``[K, C]`` that is a sum; zeros where nothing was added up, empty where it is not wanted."""
    if total is not None:
        return total
    return torch.zeros_like(like) if wanted else like.new_empty((0,))


def _is_map(noise: Tensor | None) -> bool:
    """Whether noise has a gradient: a seed has none."""
    return noise is not None and noise.dtype.is_floating_point


def one_backward(
    grad_read: Tensor | None,
    grad_scores: Tensor | None,
    grad_sums: Tensor | None,
    features: Tensor,
    labels: Tensor | None,
    keys: Tensor,
    values: Tensor,
    noise: Tensor | None,
    temperature: float,
    ignore_index: int,
    mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of features, keys, values and noise of features that were read and, given grad_sums, pooled."""
    labels = None if grad_sums is None else labels
    sizes = measure(features, keys.shape[0], values, labels)
    grad_features, features_map = _wanted_map(mask[0], features, features.shape[1])
    for_keys, for_values = sizes.slots_map(mask[1]), sizes.slots_map(mask[2] and grad_read is not None)
    grad_noise, noise_map = _wanted_slots(mask[3] and _is_map(noise), sizes, keys)
    incoming = (as_map(grad_read), as_map(grad_scores), None if grad_sums is None else grad_sums.contiguous())
    inputs = (as_map(features), as_labels(labels, ignore_index), *as_memory(keys, values, noise, temperature))
    outputs = (features_map, as_map(for_keys), as_map(for_values), noise_map)
    visit(backward_kernel, sizes, *incoming, *inputs, *outputs)
    grad_keys, grad_values = outer(sizes, (for_keys, features), (None, None), (for_values, grad_read))
    rows = _sum_or_zeros(mask[1], grad_keys, keys), _sum_or_zeros(mask[2], grad_values, values)
    return (grad_features, *rows, grad_noise)


def backward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of features, written, keys, values and noise; one that ``mask`` leaves out is empty.

    Two tensors share no data, so each half is its own kernel.
    """
    pooled = grad_sums if written is None else None
    grad_features, *rest = one_backward(
        *(grad_read, grad_scores, pooled, features, labels, keys, values, noise, temperature, ignore_index),
        [mask[0], *mask[2:]],
    )
    if written is None or not mask[1]:
        grad_written = features.new_empty((0,))
    elif grad_sums is None:
        grad_written = empty_map(written, written.shape[1]).zero_()
    else:
        grad_written = masked_average_pool.backward(grad_sums, written, labels, ignore_index, True)
    return (grad_features, grad_written, *rest)


def one_double_backward(
    grad_grad_features: Tensor | None,
    grad_grad_keys: Tensor | None,
    grad_grad_values: Tensor | None,
    grad_grad_noise: Tensor | None,
    grad_read: Tensor | None,
    grad_scores: Tensor | None,
    grad_sums: Tensor | None,
    features: Tensor,
    labels: Tensor | None,
    keys: Tensor,
    values: Tensor,
    noise: Tensor | None,
    temperature: float,
    ignore_index: int,
    mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of grad_read, grad_scores, grad_sums, features, keys, values and noise of :func:`one_backward`."""
    labels = None if grad_sums is None else labels
    sizes = measure(features, keys.shape[0], values, labels)
    for_read, read_map = _wanted_map(mask[0], features, values.shape[1])
    for_scores, scores_map = _wanted_slots(mask[1], sizes, keys)
    for_features, features_map = _wanted_map(mask[3], features, features.shape[1])
    for_noise, noise_map = _wanted_slots(mask[6] and _is_map(noise), sizes, keys)
    # what the gradients of the sums, the keys and the values are summed with, beside a, f and the gradient of the read
    a, wants_sums = grad_grad_features, mask[2] and labels is not None
    sums_a, sums_f = sizes.slots_map(wants_sums and a is not None), sizes.slots_map(wants_sums)
    keys_a, keys_f = sizes.slots_map(mask[4] and a is not None), sizes.slots_map(mask[4])
    values_g = sizes.slots_map(mask[5] and grad_read is not None)
    matrices = (None if x is None else x.contiguous() for x in (grad_grad_keys, grad_grad_values))
    incoming = (as_map(a), *matrices, as_map(grad_grad_noise))
    saved = (as_map(grad_read), as_map(grad_scores), None if grad_sums is None else grad_sums.contiguous())
    inputs = (as_map(features), as_labels(labels, ignore_index), *as_memory(keys, values, noise, temperature))
    outputs = (read_map, scores_map, features_map, noise_map, *map(as_map, (keys_a, keys_f, values_g, sums_a, sums_f)))
    visit(double_backward_kernel, sizes, *incoming, *saved, *inputs, *outputs)
    for_sums, _ = outer(sizes, (sums_a, a), (sums_f, features), (None, None))
    for_keys, for_values = outer(sizes, (keys_a, a), (keys_f, features), (values_g, grad_read))
    for_sums = _sum_or_zeros(mask[2], for_sums, keys)
    rows = _sum_or_zeros(mask[4], for_keys, keys), _sum_or_zeros(mask[5], for_values, values)
    return (for_read, for_scores, for_sums, for_features, *rows, for_noise)


def double_backward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of grad_read, grad_scores, grad_sums, features, written, keys, values and noise, by ``mask``."""
    incoming = (grad_grad_features, grad_grad_keys, grad_grad_values, grad_grad_noise)
    if grad_sums is None and mask[2]:
        grad_sums = keys.new_zeros(keys.shape)
    pooled = grad_sums if written is None else None
    for_read, for_scores, for_sums, for_features, *rest = one_double_backward(
        *incoming,
        *(grad_read, grad_scores, pooled, features, labels, keys, values, noise, temperature, ignore_index),
        [*mask[:4], *mask[5:]],
    )
    for_written = features.new_empty((0,))
    if written is not None and (mask[2] or mask[4]):
        if grad_grad_written is None or grad_sums is None:
            second = (keys.new_zeros(keys.shape), empty_map(written, written.shape[1]).zero_())
        else:
            second = masked_average_pool.double_backward(
                grad_grad_written, grad_sums, written, labels, ignore_index, True
            )
        for_sums, for_written = (
            x if is_wanted else x.new_empty((0,)) for x, is_wanted in zip(second, (mask[2], mask[4]), strict=True)
        )
    return (for_read, for_scores, for_sums, for_features, for_written, *rest)
