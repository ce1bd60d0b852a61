"""memory_read on CUDA: the kernels of memory_pass with the pooling compiled out.

Features and incoming gradients may have any strides that ``pmm_fast.ops.cuda`` takes; the read and the gradients have
the layout of ``features``.

B images, C channels, D width of the values, K slots, h x w positions.
"""

from __future__ import annotations

from torch import Tensor

from pmm_fast.ops import cuda
from pmm_fast.ops.chain import empty_if, empty_map, empty_noise_gradient

_NAME = "memory_read"


def _map_if(wanted: bool, features: Tensor, channels: int) -> Tensor:
    return empty_map(features, channels) if wanted else features.new_empty((0,))


def _scores_if(wanted: bool, features: Tensor, keys: Tensor) -> Tensor:
    batch, _, height, width = features.shape
    return keys.new_empty((batch, keys.shape[0], height, width) if wanted else (0,))


def forward(
    features: Tensor, keys: Tensor, values: Tensor, noise: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    """The read ``[B, D, h, w]`` and the scores ``[B, K, h, w]``."""
    read, scores = empty_map(features, values.shape[1]), _scores_if(True, features, keys)
    call = cuda.memory_call(features, keys.shape[0])
    cuda.add_read(call, keys, values, noise, temperature)
    call.map("out_read", read)
    call.map("out_scores", scores)
    call.run(_NAME, cuda.FORWARD)
    return read, scores


def backward(
    grad_read: Tensor | None,
    grad_scores: Tensor | None,
    features: Tensor,
    keys: Tensor,
    values: Tensor,
    noise: Tensor | None,
    temperature: float,
    mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of features, keys, values and noise; an empty tensor for each that ``mask`` does not want."""
    of_features = _map_if(mask[0], features, features.shape[1])
    of_keys, of_values = empty_if(mask[1], keys), empty_if(mask[2], values)
    of_noise = empty_noise_gradient(mask[3], noise, features)
    call = cuda.memory_call(features, keys.shape[0])
    cuda.add_read(call, keys, values, noise, temperature)
    call.map("grad_read", grad_read)
    call.map("grad_scores", grad_scores)
    call.map("out_features", of_features)
    call.address("out_keys", of_keys)
    call.address("out_values", of_values)
    call.map("out_noise", of_noise)
    call.run(_NAME, cuda.BACKWARD)
    return of_features, of_keys, of_values, of_noise


def double_backward(
    grad_grad_features: Tensor | None,
    grad_grad_keys: Tensor | None,
    grad_grad_values: Tensor | None,
    grad_grad_noise: Tensor | None,
    grad_read: Tensor | None,
    grad_scores: Tensor | None,
    features: Tensor,
    keys: Tensor,
    values: Tensor,
    noise: Tensor | None,
    temperature: float,
    mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of grad_read, grad_scores, features, keys, values and noise, as far as ``mask`` wants them."""
    of_read, of_scores = _map_if(mask[0], features, values.shape[1]), _scores_if(mask[1], features, keys)
    of_features = _map_if(mask[2], features, features.shape[1])
    of_keys, of_values = empty_if(mask[3], keys), empty_if(mask[4], values)
    of_noise = empty_noise_gradient(mask[5], noise, features)
    call = cuda.memory_call(features, keys.shape[0])
    cuda.add_read(call, keys, values, noise, temperature)
    call.map("grad_read", grad_read)
    call.map("grad_scores", grad_scores)
    call.map("grad_grad_features", grad_grad_features)
    call.matrix("grad_grad_keys", grad_grad_keys)
    call.matrix("grad_grad_values", grad_grad_values)
    call.map("grad_grad_noise", grad_grad_noise)
    call.map("out_read", of_read)
    call.map("out_scores", of_scores)
    call.map("out_features", of_features)
    call.address("out_keys", of_keys)
    call.address("out_values", of_values)
    call.map("out_noise", of_noise)
    call.run(_NAME, cuda.DOUBLE_BACKWARD)
    return of_read, of_scores, of_features, of_keys, of_values, of_noise
