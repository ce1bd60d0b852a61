"""Every operator in plain PyTorch: what the operator means.

Any device, float64/float32/bf16/fp16 inputs, any derivative order.  Kernels are correct when they equal these
functions; the derivations are in ``docs/ops``.

Shapes: B images, C channels, K classes, h x w feature positions, H x W label pixels; T tiles.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pmm_fast.ops.checks import check_label_values, is_seed

# below this squared norm a vector counts as zero (F.normalize clamps the norm itself at 1e-12)
ZERO_SQUARED_NORM = 1e-24


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type sums, norms and softmax are computed in: float64 for float64 inputs, otherwise float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def to_compute_dtype(
    features: Tensor, memory: Tensor, values: Tensor | None, noise: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys, values and noise of a read in the type it computes in; a seed stays a seed."""
    dtype = compute_dtype(features.dtype)
    keys = memory.to(dtype)
    values = keys if values is None else values.to(dtype)
    return keys, values, noise if noise is None or is_seed(noise) else noise.to(dtype)


def normalize(x: Tensor, dim: int) -> Tensor:
    """x / ||x||_2 along ``dim``; a zero vector gives zero, with zero derivatives of every order.

    ``F.normalize`` agrees on every other vector, but its derivative at zero is 1e12 x the incoming gradient.  Written
    so that NaN and infinity pass through.
    """
    squared = (x * x).sum(dim, keepdim=True)
    is_zero = squared <= ZERO_SQUARED_NORM
    scale = torch.where(is_zero, torch.ones_like(squared), squared).rsqrt()
    return x * torch.where(is_zero, torch.zeros_like(squared), scale)


def bilinear_taps(size_in: int, size_out: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Lower index, upper index and weight of the upper one for align-corners sampling along one axis."""
    scale = (size_in - 1) / (size_out - 1) if size_out > 1 else 0.0
    position = torch.arange(size_out, dtype=dtype, device=device) * scale
    lower = position.floor().long().clamp(max=size_in - 1)
    return lower, (lower + 1).clamp(max=size_in - 1), position - lower


def class_masses(
    labels: Tensor, size: tuple[int, int], num_classes: int, ignore_index: int, dtype: torch.dtype
) -> Tensor:
    """The share of each class at each feature position, ``[B, K, h, w]``.

    Equal to bilinear align-corners sampling of the one-hot labels, from the four label taps alone: the one-hot map is
    never built.  Ignored pixels carry no mass, so a position sums to one minus its ignored share.
    """
    top, bottom, weight_bottom = bilinear_taps(labels.shape[1], size[0], dtype, labels.device)
    left, right, weight_right = bilinear_taps(labels.shape[2], size[1], dtype, labels.device)
    masses = torch.zeros(labels.shape[0], num_classes + 1, *size, dtype=dtype, device=labels.device)
    for rows, weight_y in ((top, 1 - weight_bottom), (bottom, weight_bottom)):
        for columns, weight_x in ((left, 1 - weight_right), (right, weight_right)):
            tap = labels[:, rows][:, :, columns].long()
            slot = torch.where(tap == ignore_index, num_classes, tap).unsqueeze(1)
            weight = (weight_y[:, None] * weight_x).expand(slot.shape)
            masses.scatter_add_(1, slot, weight)
    return masses[:, :num_classes]


def masked_average_pool(
    features: Tensor, labels: Tensor, num_classes: int, ignore_index: int = 255, normalize_features: bool = True
) -> tuple[Tensor, Tensor]:
    """See :func:`pmm_fast.ops.masked_average_pool`."""
    check_label_values("masked_average_pool", labels, num_classes, ignore_index)
    dtype = compute_dtype(features.dtype)
    features = features.to(dtype)
    if normalize_features:
        features = normalize(features, 1)
    masses = class_masses(labels, (features.shape[2], features.shape[3]), num_classes, ignore_index, dtype)
    return torch.einsum("bkhw,bchw->kc", masses, features), masses.sum((0, 2, 3))


def update_memory(memory: Tensor, sums: Tensor, mass: Tensor, momentum: float) -> Tensor:
    """See :func:`pmm_fast.ops.update_memory`."""
    dtype = compute_dtype(torch.promote_types(memory.dtype, sums.dtype))
    memory, sums, mass = memory.to(dtype), sums.to(dtype), mass.to(dtype).unsqueeze(1)
    present = mass != 0
    mean = sums / torch.where(present, mass, torch.ones_like(mass))
    return normalize(torch.where(present, momentum * memory + (1 - momentum) * mean, memory), 1)


def memory_read(
    features: Tensor,
    memory: Tensor,
    noise: Tensor | None = None,
    temperature: float = 1.0,
    values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`pmm_fast.ops.memory_read`."""
    keys, values, noise = to_compute_dtype(features, memory, values, noise)
    scores = torch.einsum("bchw,kc->bkhw", normalize(features.to(keys.dtype), 1), keys)
    weights = assignment(scores, noise, temperature)
    return torch.einsum("bkhw,kd->bdhw", weights, values).to(features.dtype), scores


def assignment(scores: Tensor, noise: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """The weights of the read: softmax over slots of (scores + noise) / temperature, ``[B, K, h, w]``."""
    if noise is not None:
        if is_seed(noise):
            noise = seeded_gumbel_noise(noise, tuple(scores.shape), scores.dtype)
        scores = scores + noise.to(scores.dtype)
    return torch.softmax(scores / temperature, 1)


def seeded_gumbel_noise(seed: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard Gumbel noise ``[B, K, h, w]`` as a function of a seed, the same on every device and backend.

    Slot k of position i = (b h + y) w + x takes word k mod 4 of Philox-4x32-10 with key (low, high word of the seed)
    and counter (low, high word of i, k div 4, 0); the word's upper 23 bits give u, and the noise is -log(-log u)
    (docs/ops/memory_read.md).

    Args:
        seed: int64, one element; on the device that the noise is wanted on.
        shape: (B, K, h, w).
        dtype: of the result.
    """
    batch, slots, height, width = shape
    position = torch.arange(batch * height * width, device=seed.device).unsqueeze(1)
    group = torch.arange((slots + 3) // 4, device=seed.device).expand(len(position), -1)
    position = position.expand_as(group)
    counter = [position & _WORD, position >> 32, group, torch.zeros_like(group)]
    key = [seed.reshape(()) & _WORD, (seed.reshape(()) >> 32) & _WORD]
    words = torch.stack(_philox_4x32_10(counter, key), 2).flatten(1)[:, :slots]
    uniform = ((words >> 9).to(dtype) + 0.5) * 2.0**-23
    return -(-uniform.log()).log().reshape(batch, height, width, slots).permute(0, 3, 1, 2)


_WORD = 0xFFFFFFFF


def _philox_4x32_10(counter: list[Tensor], key: list[Tensor]) -> list[Tensor]:
    """Four 32-bit words a counter, as int64 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # the 64-bit products wrap in int64; the shift fills with the sign, which the mask removes
        product0, product2 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        high0, high2 = (product0 >> 32) & _WORD, (product2 >> 32) & _WORD
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, product2 & _WORD, high0 ^ c3 ^ k1, product0 & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return [c0, c1, c2, c3]


def memory_pass(
    features: Tensor,
    written: Tensor,
    labels: Tensor,
    memory: Tensor,
    noise: Tensor | None = None,
    temperature: float = 1.0,
    ignore_index: int = 255,
    values: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`pmm_fast.ops.memory_pass`."""
    read, scores = memory_read(features, memory, noise, temperature, values)
    sums, mass = masked_average_pool(written, labels, memory.shape[0], ignore_index)
    return read, scores, sums, mass


def upsample_cross_entropy(
    logits: Tensor, labels: Tensor, ignore_index: int = 255, align_corners: bool = True
) -> Tensor:
    """See :func:`pmm_fast.ops.upsample_cross_entropy`."""
    check_label_values("upsample_cross_entropy", labels, logits.shape[1], ignore_index)
    logits = logits.to(compute_dtype(logits.dtype))
    size = (labels.shape[1], labels.shape[2])
    if logits.numel() == 0 or labels.numel() == 0:
        return logits.sum() * 0
    if size != (logits.shape[2], logits.shape[3]):
        logits = F.interpolate(logits, size, mode="bilinear", align_corners=align_corners)
    total = F.cross_entropy(logits, labels.long(), ignore_index=ignore_index, reduction="sum")
    return total / (labels.long() != ignore_index).sum().clamp(min=1)


def merge_tiles(
    logits: Tensor, tops: Sequence[int], lefts: Sequence[int], tile: Sequence[int], size: Sequence[int]
) -> Tensor:
    """See :func:`pmm_fast.ops.merge_tiles`; the average in the type it is computed in."""
    total = logits.new_zeros((logits.shape[1], *size), dtype=compute_dtype(logits.dtype))
    covering = total.new_zeros(tuple(size))
    for own, top, left in zip(logits.to(total.dtype), tops, lefts, strict=True):
        place = slice(top, top + tile[0]), slice(left, left + tile[1])
        covering[place] += 1
        total[:, *place] += F.interpolate(own[None], tuple(tile), mode="bilinear", align_corners=True)[0]
    return total / covering
