"""The walk over feature positions that masked_average_pool, memory_read and memory_pass share: one kernel an order.

A half that is not asked for (the read or the pool) is given as None and leaves no trace in the compiled kernel.  The
formulas are those of docs/ops/memory_read.md; a pool is a read whose coefficients u are the class masses y and whose
keys are the gradient G of the sums, so the two add slot by slot.

Programs are few and persistent; each keeps its sums over positions in registers and writes them once, and a second
reduction adds the programs in a fixed order.  Where C (or D) exceeds a block, programs along the second axis of the
grid own a block of channels each.

Letters: see _common.py.  s scores, w weights, y class masses, r 1/||f||.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from pmm_fast.kernels._common import (
    Axis,
    Map,
    aligned_axis,
    as_map,
    combine,
    compute_dtype,
    dot,
    gumbel,
    inner,
    inverse_norm,
    load_block,
    load_label,
    load_or_zeros,
    project,
    resident_programs,
    scalar,
    scalar_bits,
    store_block,
    store_if,
    store_partial,
    taps,
    triton_dtype,
    tuned,
)
from torch import Tensor

# warps, stages: with fewer warps the sums over positions do not fit into registers
_CONFIGURATIONS = ((8, 1), (8, 2), (16, 1))
# elements of a [K, C] block of sums
_SUMS = 16384
# positions a block
_BLOCK_P = 16
_KEY = ["K", "C", "D", "BLOCK_P", "COMPUTE"]


class Memory(NamedTuple):
    """What is read: keys [K, C], values [K, D], and the bits of 1/t."""

    key: Tensor
    value: Tensor
    inverse_t: int


class Grid(NamedTuple):
    """The positions of a batch: how many images, positions an image, positions a row, where they lie in the labels."""

    images: int
    positions: int
    width: int
    rows: Axis
    columns: Axis


@triton.jit
def _locate(grid, i_block, BLOCK_P: tl.constexpr):
    """Image, offsets and mask of a block of positions; a block lies within one image."""
    blocks = tl.cdiv(grid.positions, BLOCK_P)
    o_p = (i_block % blocks) * BLOCK_P + tl.arange(0, BLOCK_P)
    return i_block // blocks, o_p, o_p < grid.positions


@triton.jit
def _own(i_split, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """The channels of a program; of C and D, the one with fewer blocks gives its blocks to several, which agree."""
    return i_split % max(1, (C + BLOCK_C - 1) // BLOCK_C) * BLOCK_C + tl.arange(0, BLOCK_C)


@triton.jit
def _add_tap(b_y, labels, at, o_y, o_x, b_weight, o_k, K: tl.constexpr):
    b_label = load_label(labels, at[0], o_y, o_x, at[2], K)
    return b_y + tl.where(b_label[:, None] == o_k[None, :], b_weight[:, None], 0.0)


@triton.jit
def _class_masses(labels, grid, at, o_k, K: tl.constexpr, COMPUTE: tl.constexpr):
    """y [BLOCK_P, BLOCK_K] from four label taps a position."""
    o_p = at[1]
    o_top, o_bottom, b_down = taps(grid.rows, o_p // grid.width, COMPUTE)
    o_left, o_right, b_across = taps(grid.columns, o_p % grid.width, COMPUTE)
    b_y = tl.zeros([o_p.shape[0], o_k.shape[0]], COMPUTE)
    b_y = _add_tap(b_y, labels, at, o_top, o_left, (1 - b_down) * (1 - b_across), o_k, K)
    b_y = _add_tap(b_y, labels, at, o_top, o_right, (1 - b_down) * b_across, o_k, K)
    b_y = _add_tap(b_y, labels, at, o_bottom, o_left, b_down * (1 - b_across), o_k, K)
    return _add_tap(b_y, labels, at, o_bottom, o_right, b_down * b_across, o_k, K)


@triton.jit
def _weights(b_scores, memory, noise, seed, grid, at, o_k, K: tl.constexpr):
    """w = softmax((s + g) / t)."""
    b_z = b_scores
    if noise is not None:
        b_z += load_block(noise, at, o_k, K, b_scores.dtype)
    if seed is not None:
        o_row = at[0].to(tl.int64) * grid.positions + at[1]
        b_z += gumbel(seed, o_row, o_k.shape[0], b_scores.dtype)
    b_z = tl.where((o_k < K)[None, :], b_z * scalar(memory.inverse_t, b_z.dtype), float("-inf"))
    b_e = tl.exp(b_z - tl.max(b_z, 1)[:, None])
    return b_e / tl.sum(b_e, 1)[:, None]


@triton.jit
def _store_slots(m, b_x, i_split, at, o_k, K: tl.constexpr):
    """Write [BLOCK_P, BLOCK_K] of a map unless it is None; of the programs of a position, the first does."""
    if (m is not None) and (i_split == 0):
        store_block(m, b_x, at, o_k, K)


@triton.jit
def _add_outer(wanted, b_sum, b_u, b_x):
    """b_sum + sum_p u_k x."""
    if wanted is not None:
        b_sum = dot(tl.trans(b_u), b_x, b_sum)
    return b_sum


@triton.jit
def _add_rows(wanted, b_sum, b_u, b_sigma, own, b_r):
    """b_sum + sum_p (r u_k a + sigma_k f^)."""
    b_sum = _add_outer(wanted, b_sum, b_u * b_r[:, None], own[0])
    return _add_outer(wanted, b_sum, b_sigma * b_r[:, None], own[2])


@tuned(_KEY, _CONFIGURATIONS)
@triton.jit
def forward_kernel(
    features, written, labels, memory, noise, seed, read, scores, sums, mass, grid,
    K: tl.constexpr, C: tl.constexpr, D: tl.constexpr, NORMALIZE: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Read ``features`` (unless memory is None), pool ``written`` or, if None, ``features`` (unless labels is None)."""
    i_program, i_split = tl.program_id(0), tl.program_id(1)
    o_k = tl.arange(0, BLOCK_K)
    o_c, o_d = _own(i_split, C, BLOCK_C), _own(i_split, D, BLOCK_D)
    b_sums, b_mass = tl.zeros([BLOCK_K, BLOCK_C], COMPUTE), tl.zeros([BLOCK_K], COMPUTE)
    for i_block in range(i_program, grid.images * tl.cdiv(grid.positions, BLOCK_P), tl.num_programs(0)):
        at = _locate(grid, i_block, BLOCK_P)
        b_f = load_block(features, at, o_c, C, COMPUTE)
        b_r = tl.full([BLOCK_P], 1.0, COMPUTE)
        if NORMALIZE:
            b_r = inverse_norm(inner(b_f, features, b_f, features, at, o_c, C))
        if memory is not None:
            b_s = project(b_f, features, memory.key, at, o_k, o_c, K, C) * b_r[:, None]
            _store_slots(scores, b_s, i_split, at, o_k, K)
            b_w = _weights(b_s, memory, noise, seed, grid, at, o_k, K)
            store_block(read, combine(b_w, memory.value, None, o_k, o_d, K, D), at, o_d, D)
        if labels is not None:
            b_y = _class_masses(labels, grid, at, o_k, K, COMPUTE)
            b_mass += tl.sum(b_y, 0)
            if written is not None:
                b_f = load_block(written, at, o_c, C, COMPUTE)
                b_r = inverse_norm(inner(b_f, written, b_f, written, at, o_c, C))
            b_sums = dot(tl.trans(b_y * b_r[:, None]), b_f, b_sums)
    store_partial(sums, b_sums, i_program, o_k, o_c, K, C)
    if (labels is not None) and (i_split == 0):
        tl.store(mass + i_program * K + o_k, b_mass, mask=o_k < K)


@triton.jit
def _centred(b_w, b_x, memory):
    """The derivative of the weights along b_x: w (x - sum w x) / t."""
    return b_w * (b_x - tl.sum(b_w * b_x, 1)[:, None]) * scalar(memory.inverse_t, b_x.dtype)


@tuned(_KEY, _CONFIGURATIONS)
@triton.jit
def backward_kernel(
    grad_read, grad_scores, grad_sums, features, labels, memory, noise, seed,
    grad_features, grad_keys, grad_values, grad_noise, grid,
    K: tl.constexpr, C: tl.constexpr, D: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradients of a read (unless memory is None) and of a pool (unless labels is None) of the same features.

    Features None: a pool that does not normalise.
    """
    i_program, i_split = tl.program_id(0), tl.program_id(1)
    o_k = tl.arange(0, BLOCK_K)
    o_c, o_d = _own(i_split, C, BLOCK_C), _own(i_split, D, BLOCK_D)
    b_keys_sum, b_values_sum = tl.zeros([BLOCK_K, BLOCK_C], COMPUTE), tl.zeros([BLOCK_K, BLOCK_D], COMPUTE)
    for i_block in range(i_program, grid.images * tl.cdiv(grid.positions, BLOCK_P), tl.num_programs(0)):
        at = _locate(grid, i_block, BLOCK_P)
        b_f = load_or_zeros(features, at, o_c, C, COMPUTE)
        b_r = inverse_norm(inner(b_f, features, b_f, features, at, o_c, C))
        b_us, b_x = tl.zeros([BLOCK_P], COMPUTE), tl.zeros([BLOCK_P, BLOCK_C], COMPUTE)
        if memory is not None:
            b_s = project(b_f, features, memory.key, at, o_k, o_c, K, C) * b_r[:, None]
            b_w = _weights(b_s, memory, noise, seed, grid, at, o_k, K)
            b_a = load_or_zeros(grad_read, at, o_d, D, COMPUTE)
            b_v = _centred(b_w, project(b_a, grad_read, memory.value, at, o_k, o_d, K, D), memory)
            b_u = load_or_zeros(grad_scores, at, o_k, K, COMPUTE) + b_v
            b_us += tl.sum(b_u * b_s, 1)
            b_x = combine(b_u, memory.key, b_x, o_k, o_c, K, C)
            b_keys_sum = _add_outer(grad_keys, b_keys_sum, b_u * b_r[:, None], b_f)
            b_values_sum = _add_outer(grad_values, b_values_sum, b_w, b_a)
            _store_slots(grad_noise, b_v, i_split, at, o_k, K)
        if labels is not None:
            b_y = _class_masses(labels, grid, at, o_k, K, COMPUTE)
            b_us += tl.sum(b_y * project(b_f, features, grad_sums, at, o_k, o_c, K, C), 1) * b_r
            b_x = combine(b_y, grad_sums, b_x, o_k, o_c, K, C)
        if features is not None:
            b_x = b_r[:, None] * (b_x - (b_us * b_r)[:, None] * b_f)
        store_if(grad_features, b_x, at, o_c, C)
    store_partial(grad_keys, b_keys_sum, i_program, o_k, o_c, K, C)
    store_partial(grad_values, b_values_sum, i_program, o_k, o_d, K, D)


@triton.jit
def _turn(own, p_keys, p_grad_keys, b_s, b_beta, b_r, at, o_k, o_c, K: tl.constexpr, C: tl.constexpr):
    """rho, the derivative of the scores: r (keys.a - s beta) + P.f^."""
    b_a, a, b_f, f = own
    b_rho = project(b_a, a, p_keys, at, o_k, o_c, K, C) - b_s * b_beta[:, None]
    return b_r[:, None] * (b_rho + project(b_f, f, p_grad_keys, at, o_k, o_c, K, C))


@triton.jit
def _second_weights(b_w, b_d, b_h, b_c, memory):
    """t and q of docs/ops/memory_read.md from d, h and c."""
    b_d_mean, b_h_mean = tl.sum(b_w * b_d, 1)[:, None], tl.sum(b_w * b_h, 1)[:, None]
    b_mixed = (b_d * b_h - b_d * b_h_mean - b_h * b_d_mean) * scalar(memory.inverse_t, b_w.dtype)
    return _centred(b_w, b_h, memory), _centred(b_w, b_mixed + b_c, memory)


@tuned(_KEY, _CONFIGURATIONS)
@triton.jit
def double_backward_kernel(
    grad_grad_features, grad_grad_keys, grad_grad_values, grad_grad_noise, grad_read, grad_scores, grad_sums,
    features, labels, memory, noise, seed,
    for_read, for_scores, for_sums, for_features, for_keys, for_values, for_noise, grid,
    K: tl.constexpr, C: tl.constexpr, D: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradients of what backward_kernel computes, with respect to all that it reads."""
    i_program, i_split = tl.program_id(0), tl.program_id(1)
    o_k = tl.arange(0, BLOCK_K)
    o_c, o_d = _own(i_split, C, BLOCK_C), _own(i_split, D, BLOCK_D)
    b_keys_sum, b_values_sum = tl.zeros([BLOCK_K, BLOCK_C], COMPUTE), tl.zeros([BLOCK_K, BLOCK_D], COMPUTE)
    b_sums = tl.zeros([BLOCK_K, BLOCK_C], COMPUTE)
    for i_block in range(i_program, grid.images * tl.cdiv(grid.positions, BLOCK_P), tl.num_programs(0)):
        at = _locate(grid, i_block, BLOCK_P)
        b_f = load_block(features, at, o_c, C, COMPUTE)
        b_a = load_or_zeros(grad_grad_features, at, o_c, C, COMPUTE)
        b_r = inverse_norm(inner(b_f, features, b_f, features, at, o_c, C))
        b_beta = inner(b_a, grad_grad_features, b_f, features, at, o_c, C) * b_r
        own = (b_a, grad_grad_features, b_f, features)
        # gamma but for its last term; sum of u s; f^.gamma + r kappa but for its last term
        b_x, b_us, b_along = tl.zeros([BLOCK_P, BLOCK_C], COMPUTE), tl.zeros_like(b_r), tl.zeros_like(b_r)
        if memory is not None:
            b_s = project(b_f, features, memory.key, at, o_k, o_c, K, C) * b_r[:, None]
            b_rho = _turn(own, memory.key, grad_grad_keys, b_s, b_beta, b_r, at, o_k, o_c, K, C)
            b_w = _weights(b_s, memory, noise, seed, grid, at, o_k, K)
            b_g = load_or_zeros(grad_read, at, o_d, D, COMPUTE)
            b_d = project(b_g, grad_read, memory.value, at, o_k, o_d, K, D)
            b_h = b_rho + load_or_zeros(grad_grad_noise, at, o_k, K, COMPUTE)
            b_c = project(b_g, grad_read, grad_grad_values, at, o_k, o_d, K, D)
            b_u = load_or_zeros(grad_scores, at, o_k, K, COMPUTE) + _centred(b_w, b_d, memory)
            b_t, b_q = _second_weights(b_w, b_d, b_h, b_c, memory)
            b_sigma = b_q - (b_r * b_beta)[:, None] * b_u
            b_us += tl.sum(b_u * b_s, 1)
            b_along += tl.sum(b_sigma * b_s + b_u * b_rho, 1)
            _store_slots(for_scores, b_rho, i_split, at, o_k, K)
            _store_slots(for_noise, b_q, i_split, at, o_k, K)
            b_o = combine(b_w, grad_grad_values, None, o_k, o_d, K, D)
            store_if(for_read, combine(b_t, memory.value, b_o, o_k, o_d, K, D), at, o_d, D)
            b_x = combine(b_sigma, memory.key, combine(b_u, grad_grad_keys, b_x, o_k, o_c, K, C), o_k, o_c, K, C)
            b_keys_sum = _add_rows(for_keys, b_keys_sum, b_u, b_sigma, own, b_r)
            b_values_sum = _add_outer(for_values, b_values_sum, b_t, b_g)
        if labels is not None:
            b_y = _class_masses(labels, grid, at, o_k, K, COMPUTE)
            b_s = project(b_f, features, grad_sums, at, o_k, o_c, K, C) * b_r[:, None]
            b_rho = _turn(own, grad_sums, None, b_s, b_beta, b_r, at, o_k, o_c, K, C)
            b_sigma = -(b_r * b_beta)[:, None] * b_y
            b_us += tl.sum(b_y * b_s, 1)
            b_along += tl.sum(b_sigma * b_s + b_y * b_rho, 1)
            b_x = combine(b_sigma, grad_sums, b_x, o_k, o_c, K, C)
            b_sums = _add_rows(for_sums, b_sums, b_y, b_sigma, own, b_r)
        b_x -= (b_r * b_us)[:, None] * b_a + (b_r * (b_along - b_r * b_us * b_beta))[:, None] * b_f
        store_if(for_features, b_r[:, None] * b_x, at, o_c, C)
    store_partial(for_keys, b_keys_sum, i_program, o_k, o_c, K, C)
    store_partial(for_values, b_values_sum, i_program, o_k, o_d, K, D)
    store_partial(for_sums, b_sums, i_program, o_k, o_c, K, C)


class Sizes(NamedTuple):
    """What a launch derives from its shapes."""

    grid: Grid
    meta: dict[str, Any]
    programs: int
    splits: int
    shape: tuple[int, int]
    device: torch.device
    dtype: torch.dtype

    def partial(self, wanted: bool, *shape: int) -> Tensor | None:
        """A workspace for one tensor of partial sums a program."""
        return torch.empty((self.programs, *shape), device=self.device, dtype=self.dtype) if wanted else None


def measure(features: Tensor, slots: int, values: Tensor | None, labels: Tensor | None) -> Sizes:
    """Blocks and programs for ``features [B, C, h, w]``, ``values [K, D]`` and ``labels [B, H, W]``."""
    images, channels, height, width = features.shape
    label_size = labels.shape[1:] if labels is not None else (1, 1)
    rows, columns = map(aligned_axis, label_size, (height, width))
    widths = {"C": channels, "D": values.shape[1] if values is not None else 0}
    block_k = max(16, triton.next_power_of_2(slots))
    dtype = compute_dtype(features.dtype)
    # the sums of a block of channels stay in registers; a float64 product needs the smallest blocks
    most = 16 if dtype == torch.float64 else max(16, _SUMS // block_k)
    blocks = {f"BLOCK_{x}": min(most, max(16, triton.next_power_of_2(n))) for x, n in widths.items()}
    meta = {"K": slots, **widths, "COMPUTE": triton_dtype(dtype), "BLOCK_P": _BLOCK_P, "BLOCK_K": block_k, **blocks}
    return Sizes(
        Grid(images, height * width, width, rows, columns),
        meta,
        # bounded, so that the partial sums stay small
        min(images * triton.cdiv(height * width, _BLOCK_P), resident_programs(features.device)),
        max(triton.cdiv(n, blocks[f"BLOCK_{x}"]) for x, n in widths.items()),
        (height, width),
        features.device,
        dtype,
    )


def launch(kernel: Any, sizes: Sizes, *args: Any, **flags: Any) -> None:
    """Run a kernel of this file, unless there is no position to visit."""
    if sizes.programs and sizes.splits:
        kernel[(sizes.programs, sizes.splits)](*args, **sizes.meta, **flags)


def total(partial: Tensor | None, like: Tensor) -> Tensor:
    """The sum over programs, in a fixed order; an empty tensor where it is not wanted."""
    return partial.sum(0) if partial is not None else like.new_empty((0,))


def as_memory(
    keys: Tensor, values: Tensor, noise: Tensor | None, temperature: float
) -> tuple[Memory, Map | None, Tensor | None]:
    """The memory, the noise and its seed as the kernels take them."""
    memory = Memory(keys.contiguous(), values.contiguous(), scalar_bits(1 / temperature))
    is_seed = noise is not None and noise.dtype == torch.int64
    return memory, None if is_seed else as_map(noise), noise if is_seed else None
