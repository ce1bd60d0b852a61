"""memory_pass on the CPU.  Formulas: docs/ops/memory_pass.md.

``labels`` None leaves the pool out (:mod:`pmm_fast.ops.cpu.memory_read`).
"""

from __future__ import annotations

from torch import Tensor

from pmm_fast.ops.chain import empty_if, empty_map, empty_map_if, empty_noise_gradient
from pmm_fast.ops.cpu import noise_fields, readable_labels, run_pass

_NAME = "memory_pass"


def _scores_like(features: Tensor, keys: Tensor) -> Tensor:
    return keys.new_empty((features.shape[0], keys.shape[0], *features.shape[2:]))


def forward(
    features: Tensor,
    written: Tensor | None,
    labels: Tensor | None,
    keys: Tensor,
    values: Tensor,
    noise: Tensor | None,
    temperature: float,
    ignore_index: int,
    operator: str = _NAME,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``read [B, D, h, w]``, ``scores [B, K, h, w]``, ``sums [K, C]``, ``mass [K]``."""
    (classes, channels), depth = keys.shape, values.shape[1]
    read, scores = empty_map(features, depth), _scores_like(features, keys)
    sums, mass = keys.new_empty((classes, channels)), keys.new_empty((classes,))
    labels = None if labels is None else readable_labels(labels)
    noise_map, seed = noise_fields(noise)
    maps = {"written": written, **noise_map, "read": read, "scores": scores}
    matrices = {"keys": keys, "values": values, **seed}
    if labels is not None:
        matrices |= {"sums_out": sums, "mass_out": mass}
    run_pass(operator, 0, features, labels, classes, depth, ignore_index, maps, matrices, temperature=temperature)
    return read, scores, sums, mass


def backward(
    grad_read: Tensor | None,
    grad_scores: Tensor | None,
    grad_sums: Tensor | None,
    features: Tensor,
    written: Tensor | None,
    labels: Tensor | None,
    keys: Tensor,
    values: Tensor,
    noise: Tensor | None,
    temperature: float,
    ignore_index: int,
    mask: list[bool],
    operator: str = _NAME,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of features, written, keys, values and noise; empty where ``mask`` does not ask for them."""
    (classes, channels), depth = keys.shape, values.shape[1]
    of_features = empty_map_if(mask[0], features, features, channels)
    of_written = empty_map_if(mask[1], written, features, channels)
    of_keys, of_values = empty_if(mask[2], keys), empty_if(mask[3], values)
    of_noise = empty_noise_gradient(mask[4], noise, features)
    labels = None if labels is None else readable_labels(labels)
    noise_map, seed = noise_fields(noise)
    maps = {"written": written, **noise_map, "grad_read": grad_read, "grad_scores": grad_scores}
    maps |= {"features_out": of_features, "written_out": of_written, "noise_out": of_noise}
    matrices = {"keys": keys, "values": values, **seed, "grad_sums": grad_sums}
    matrices |= {"keys_out": of_keys, "values_out": of_values}
    run_pass(operator, 1, features, labels, classes, depth, ignore_index, maps, matrices, temperature=temperature)
    return of_features, of_written, of_keys, of_values, of_noise


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
    labels: Tensor | None,
    keys: Tensor,
    values: Tensor,
    noise: Tensor | None,
    temperature: float,
    ignore_index: int,
    mask: list[bool],
    operator: str = _NAME,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of grad_read, grad_scores, grad_sums, features, written, keys, values, noise; empty if unwanted."""
    (classes, channels), depth = keys.shape, values.shape[1]
    of_read = empty_map_if(mask[0], features, features, depth)
    of_scores = _scores_like(features, keys) if mask[1] else keys.new_empty((0,))
    of_sums = empty_if(mask[2], keys)
    of_features = empty_map_if(mask[3], features, features, channels)
    of_written = empty_map_if(mask[4], written, features, channels)
    of_keys, of_values = empty_if(mask[5], keys), empty_if(mask[6], values)
    of_noise = empty_noise_gradient(mask[7], noise, features)
    labels = None if labels is None else readable_labels(labels)
    noise_map, seed = noise_fields(noise)
    maps = {"written": written, **noise_map, "grad_read": grad_read, "grad_scores": grad_scores}
    maps |= {"grad_grad_features": grad_grad_features, "grad_grad_written": grad_grad_written}
    maps |= {"grad_grad_noise": grad_grad_noise, "read": of_read, "scores": of_scores}
    maps |= {"features_out": of_features, "written_out": of_written, "noise_out": of_noise}
    matrices = {"keys": keys, "values": values, **seed, "grad_sums": grad_sums, "sums_out": of_sums}
    matrices |= {"grad_grad_keys": grad_grad_keys, "grad_grad_values": grad_grad_values}
    matrices |= {"keys_out": of_keys, "values_out": of_values}
    run_pass(operator, 2, features, labels, classes, depth, ignore_index, maps, matrices, temperature=temperature)
    return of_read, of_scores, of_sums, of_features, of_written, of_keys, of_values, of_noise
