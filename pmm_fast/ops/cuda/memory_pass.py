"""memory_pass on CUDA: one walk where one tensor is read and pooled, else a walk for each half.

Two tensors share no data, only the launch; the halves are then the kernels of memory_read and masked_average_pool, and
so are the cases in which no gradient arrives at one of the halves.

B images, C channels, D width of the values, K slots, h x w positions, H x W label pixels.
"""

from __future__ import annotations

from torch import Tensor

from pmm_fast.ops import cuda
from pmm_fast.ops.chain import empty_if, empty_map, empty_map_if, empty_noise_gradient
from pmm_fast.ops.cuda import masked_average_pool, memory_read

_NAME = "memory_pass"


def forward(
    features: Tensor,
    written: Tensor | None,
    labels: Tensor,
    keys: Tensor,
    values: Tensor,
    noise: Tensor | None,
    temperature: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The read, the scores, the class sums and the masses; ``written`` None: the features are pooled themselves."""
    slots = keys.shape[0]
    if written is not None:
        read, scores = memory_read.forward(features, keys, values, noise, temperature)
        return read, scores, *masked_average_pool.forward(written, labels, slots, ignore_index, True)
    batch, channels, height, width = features.shape
    read, scores = empty_map(features, values.shape[1]), keys.new_empty((batch, slots, height, width))
    sums, mass = keys.new_empty((slots, channels)), keys.new_empty((slots,))
    call = cuda.memory_call(features, slots)
    cuda.add_read(call, keys, values, noise, temperature)
    cuda.add_pool(call, labels, ignore_index)
    call.map("out_read", read)
    call.map("out_scores", scores)
    call.address("out_sums", sums)
    call.address("out_mass", mass)
    call.run(_NAME, cuda.FORWARD)
    return read, scores, sums, mass


def _pool_backward(
    grad_sums: Tensor | None, written: Tensor | None, labels: Tensor, ignore_index: int, wanted: bool, features: Tensor
) -> Tensor:
    if not wanted or written is None:
        return features.new_empty((0,))
    if grad_sums is None:
        return empty_map(written, written.shape[1]).zero_()
    return masked_average_pool.backward(grad_sums, written, labels, ignore_index, True)


def _read_backward(
    grad_read: Tensor | None,
    grad_scores: Tensor | None,
    features: Tensor,
    keys: Tensor,
    values: Tensor,
    noise: Tensor | None,
    temperature: float,
    mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if grad_read is not None or grad_scores is not None:
        return memory_read.backward(grad_read, grad_scores, features, keys, values, noise, temperature, mask)
    return (
        empty_map_if(mask[0], features, features, features.shape[1]).zero_(),
        empty_if(mask[1], keys).zero_(),
        empty_if(mask[2], values).zero_(),
        empty_noise_gradient(mask[3], noise, features).zero_(),
    )


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
    """The gradients of features, written, keys, values and noise, as far as ``mask`` wants them."""
    if written is not None or grad_sums is None:
        of_read = [mask[0], *mask[2:]]
        first, *rest = _read_backward(grad_read, grad_scores, features, keys, values, noise, temperature, of_read)
        second = _pool_backward(grad_sums, written, labels, ignore_index, mask[1], features)
        return first, second, rest[0], rest[1], rest[2]
    of_features = empty_map_if(mask[0], features, features, features.shape[1])
    of_keys, of_values = empty_if(mask[2], keys), empty_if(mask[3], values)
    of_noise = empty_noise_gradient(mask[4], noise, features)
    call = cuda.memory_call(features, keys.shape[0])
    cuda.add_read(call, keys, values, noise, temperature)
    cuda.add_pool(call, labels, ignore_index)
    call.map("grad_read", grad_read)
    call.map("grad_scores", grad_scores)
    call.matrix("grad_sums", grad_sums)
    call.map("out_features", of_features)
    call.address("out_keys", of_keys)
    call.address("out_values", of_values)
    call.map("out_noise", of_noise)
    call.run(_NAME, cuda.BACKWARD)
    return of_features, features.new_empty((0,)), of_keys, of_values, of_noise


def _pool_double_backward(
    grad_grad_written: Tensor | None,
    grad_sums: Tensor | None,
    written: Tensor | None,
    labels: Tensor,
    keys: Tensor,
    ignore_index: int,
    mask: tuple[bool, bool],
    features: Tensor,
) -> tuple[Tensor, Tensor]:
    """The gradients of grad_sums and written where written is a tensor of its own, or nothing is pooled."""
    if any(mask) and written is not None and grad_grad_written is not None and grad_sums is not None:
        both = masked_average_pool.double_backward(grad_grad_written, grad_sums, written, labels, ignore_index, True)
        return (
            both[0] if mask[0] else empty_if(False, keys),
            both[1] if mask[1] else features.new_empty((0,)),
        )
    return empty_if(mask[0], keys).zero_(), empty_map_if(mask[1], written, features, features.shape[1]).zero_()


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
    """The gradients of grad_read, grad_scores, grad_sums, features, written, keys, values and noise (``mask``)."""
    incoming = (grad_grad_features, grad_grad_keys, grad_grad_values, grad_grad_noise, grad_read, grad_scores)
    memory = (keys, values, noise, temperature)
    if written is None and grad_sums is not None and grad_grad_features is not None:
        return _double_backward_of_one(incoming, grad_sums, features, labels, memory, ignore_index, mask)
    of_read = [mask[0], mask[1], mask[3], *mask[5:]]
    reads = memory_read.double_backward(*incoming, features, *memory, of_read)
    pools = _pool_double_backward(
        grad_grad_written, grad_sums, written, labels, keys, ignore_index, (mask[2], mask[4]), features
    )
    return reads[0], reads[1], pools[0], reads[2], pools[1], reads[3], reads[4], reads[5]


def _double_backward_of_one(
    incoming: tuple[Tensor | None, ...],
    grad_sums: Tensor,
    features: Tensor,
    labels: Tensor,
    memory: tuple[Tensor, Tensor, Tensor | None, float],
    ignore_index: int,
    mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of one tensor that is read and pooled, both halves in one walk."""
    keys, values, noise, _ = memory
    nothing = features.new_empty((0,))
    of_read = empty_map_if(mask[0], features, features, values.shape[1])
    of_scores = keys.new_empty((features.shape[0], keys.shape[0], *features.shape[2:]) if mask[1] else (0,))
    of_features = empty_map_if(mask[3], features, features, features.shape[1])
    of_sums, of_keys, of_values = empty_if(mask[2], keys), empty_if(mask[5], keys), empty_if(mask[6], values)
    of_noise = empty_noise_gradient(mask[7], noise, features)
    call = cuda.memory_call(features, keys.shape[0])
    cuda.add_read(call, *memory)
    cuda.add_pool(call, labels, ignore_index)
    a, of_grad_keys, of_grad_values, of_grad_noise, grad_read, grad_scores = incoming
    for name, given in (("grad_grad_features", a), ("grad_grad_noise", of_grad_noise)):
        call.map(name, given)
    for name, given in (("grad_read", grad_read), ("grad_scores", grad_scores)):
        call.map(name, given)
    for name, given in (("grad_sums", grad_sums), ("grad_grad_keys", of_grad_keys)):
        call.matrix(name, given)
    call.matrix("grad_grad_values", of_grad_values)
    for name, result in (("out_read", of_read), ("out_scores", of_scores), ("out_features", of_features)):
        call.map(name, result)
    call.map("out_noise", of_noise)
    for name, result in (("out_sums", of_sums), ("out_keys", of_keys), ("out_values", of_values)):
        call.address(name, result)
    call.run(_NAME, cuda.DOUBLE_BACKWARD)
    return of_read, of_scores, of_sums, of_features, nothing, of_keys, of_values, of_noise
