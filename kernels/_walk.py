"""The walk over feature positions that masked_average_pool, memory_read and memory_pass share: one kernel an order.

A half that is not asked for (the read or the pool) is given as None and leaves no trace in the compiled kernel.  The
formulas are those of docs/ops/memory_read.md; a pool is a read whose coefficients u are the class masses y and whose
keys are the gradient G of the sums, so the two add slot by slot.

Kernels that visit each position by itself have small programs: channels pass through them in chunks, and no sum over
positions is kept.  What such sums need of a position, K numbers, is written, and outer_kernel adds up the products with
the maps, which it reads again: sums in registers beside everything else would leave room for one program on a
multiprocessor.  Programs that add up are few; each writes its sums, and total_kernel adds those in a fixed order.

Letters: see _common.py.  s scores, w weights, y class masses, r 1/||f||.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from pmm_fast.kernels._common import (
    Axis,
    combine,
    dot,
    gumbel,
    inverse_norm,
    load_block,
    load_label,
    load_or_zeros,
    products,
    scalar,
    squared_norm,
    store_block,
    store_partial,
    taps,
)
from torch import Tensor


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
def _store_slots(m, b_x, at, o_k, K: tl.constexpr):
    """Write [BLOCK_P, BLOCK_K] of a map, unless that is None."""
    if m is not None:
        store_block(m, b_x, at, o_k, K)


@triton.jit
def _read(
    features, memory, noise, seed, read, scores, grid, at, o_k,
    K: tl.constexpr, C: tl.constexpr, D: tl.constexpr, COMPUTE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Write scores and the weighted sum of the values at a block of positions; returns 1/||f||."""
    b_ff, _, b_s, _, _ = products(features, None, memory.key, None, at, o_k, K, C, CHUNK, COMPUTE)
    b_r = inverse_norm(b_ff)
    b_s *= b_r[:, None]
    _store_slots(scores, b_s, at, o_k, K)
    b_w = _weights(b_s, memory, noise, seed, grid, at, o_k, K)
    for i_d in tl.range(0, D, CHUNK, disable_licm=True):
        o_d = i_d + tl.arange(0, CHUNK)
        store_block(read, combine(b_w, memory.value, None, o_k, o_d, K, D), at, o_d, D)
    return b_r


@triton.jit
def read_kernel(
    features, memory, noise, seed, read, scores, grid,
    K: tl.constexpr, C: tl.constexpr, D: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Scores, weights, and the weighted sum of the values."""
    at, o_k = _locate(grid, tl.program_id(0), BLOCK_P), tl.arange(0, BLOCK_K)
    _read(features, memory, noise, seed, read, scores, grid, at, o_k, K, C, D, COMPUTE, CHUNK)


@triton.jit
def pool_kernel(
    features, labels, memory, noise, seed, read, scores, sums, mass, grid, NORMALIZE: tl.constexpr,
    K: tl.constexpr, C: tl.constexpr, D: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Class sums and masses of a program's share of the positions; unless memory is None, it reads at them as well."""
    i_program, i_split = tl.program_id(0), tl.program_id(1)
    o_k, o_c = tl.arange(0, BLOCK_K), i_split * BLOCK_C + tl.arange(0, BLOCK_C)
    b_sums, b_mass = tl.zeros([BLOCK_K, BLOCK_C], COMPUTE), tl.zeros([BLOCK_K], COMPUTE)
    for i_block in range(i_program, grid.images * tl.cdiv(grid.positions, BLOCK_P), tl.num_programs(0)):
        at = _locate(grid, i_block, BLOCK_P)
        b_y = _class_masses(labels, grid, at, o_k, K, COMPUTE)
        b_mass += tl.sum(b_y, 0)
        if memory is not None:
            # of the programs of a block of positions, which have a block of channels each, the first reads
            if i_split == 0:
                b_r = _read(features, memory, noise, seed, read, scores, grid, at, o_k, K, C, D, COMPUTE, CHUNK)
            else:
                b_ff, _, _, _, _ = products(features, None, None, None, at, o_k, K, C, CHUNK, COMPUTE)
                b_r = inverse_norm(b_ff)
            b_y *= b_r[:, None]
        b_f = load_block(features, at, o_c, C, COMPUTE)
        if NORMALIZE and (memory is None):
            b_y *= inverse_norm(squared_norm(b_f, features, at, C, CHUNK))[:, None]
        b_sums = dot(tl.trans(b_y), b_f, b_sums)
    store_partial(sums, b_sums, i_program, o_k, o_c, K, C)
    if i_split == 0:
        tl.store(mass + i_program * K + o_k, b_mass, mask=o_k < K)


@triton.jit
def _add_outer(b_sums, u, x, at, o_k, o_c, K: tl.constexpr, C: tl.constexpr):
    """b_sums + sum_p u_k x_c over a block of positions."""
    b_u = tl.trans(load_block(u, at, o_k, K, b_sums.dtype))
    return dot(b_u, load_block(x, at, o_c, C, b_sums.dtype), b_sums)


@triton.jit
def outer_kernel(
    u, x, v, y, w, z, sums, more_sums, grid,
    K: tl.constexpr, C: tl.constexpr, D: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """sum_p u_k x_c + v_k y_c by SPLITS of the programs of a share of positions, sum_p w_k z_d by the others.

    Any of the three may be None.
    """
    i_program, i_split, o_k = tl.program_id(0), tl.program_id(1), tl.arange(0, BLOCK_K)
    first, step, blocks = i_program, tl.num_programs(0), grid.images * tl.cdiv(grid.positions, BLOCK_P)
    b_sums = tl.zeros([BLOCK_K, BLOCK_C], COMPUTE)
    if i_split < SPLITS:
        o_c = i_split * BLOCK_C + tl.arange(0, BLOCK_C)
        for i_block in range(first, blocks, step):
            at = _locate(grid, i_block, BLOCK_P)
            if u is not None:
                b_sums = _add_outer(b_sums, u, x, at, o_k, o_c, K, C)
            if v is not None:
                b_sums = _add_outer(b_sums, v, y, at, o_k, o_c, K, C)
        if sums is not None:
            store_partial(sums, b_sums, i_program, o_k, o_c, K, C)
    else:
        o_d = (i_split - SPLITS) * BLOCK_C + tl.arange(0, BLOCK_C)
        if w is not None:
            for i_block in range(first, blocks, step):
                b_sums = _add_outer(b_sums, w, z, _locate(grid, i_block, BLOCK_P), o_k, o_d, K, D)
            store_partial(more_sums, b_sums, i_program, o_k, o_d, K, D)


@triton.jit
def _add_programs(p_partial, p_total, i_block, programs, size, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    o_n = i_block * BLOCK + tl.arange(0, BLOCK)
    b_sum = tl.zeros([ROWS, BLOCK], p_total.dtype.element_ty)
    for i_row in range(0, programs, ROWS):
        o_row = i_row + tl.arange(0, ROWS)
        mask = (o_row < programs)[:, None] & (o_n < size)[None, :]
        b_sum += tl.load(p_partial + o_row.to(tl.int64)[:, None] * size + o_n[None, :], mask=mask, other=0.0)
    tl.store(p_total + o_n, tl.sum(b_sum, 0), mask=o_n < size)


@triton.jit
def total_kernel(
    first, second, first_total, second_total, programs, first_size, second_size, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Add up what programs left, [programs, size], in a fixed order; of two tensors, the second may be None."""
    i_block, blocks = tl.program_id(0), tl.cdiv(first_size, BLOCK)
    if i_block < blocks:
        _add_programs(first, first_total, i_block, programs, first_size, ROWS, BLOCK)
    elif second is not None:
        _add_programs(second, second_total, i_block - blocks, programs, second_size, ROWS, BLOCK)


@triton.jit
def _centred(b_w, b_x, memory):
    """The derivative of the weights along b_x: w (x - sum w x) / t."""
    return b_w * (b_x - tl.sum(b_w * b_x, 1)[:, None]) * scalar(memory.inverse_t, b_x.dtype)


@triton.jit
def backward_kernel(
    grad_read, grad_scores, grad_sums, features, labels, memory, noise, seed,
    grad_features, for_keys, for_values, grad_noise, grid,
    K: tl.constexpr, C: tl.constexpr, D: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Gradients of a read (unless memory is None) and of a pool (unless labels is None) of the same features.

    ``for_keys`` and ``for_values`` are what the gradients of those are summed with: r u and w.  Features None: a pool
    that does not normalise.
    """
    at, o_k = _locate(grid, tl.program_id(0), BLOCK_P), tl.arange(0, BLOCK_K)
    keys = None
    if memory is not None:
        keys = memory.key
    b_y = tl.zeros([BLOCK_P, BLOCK_K], COMPUTE)
    if labels is not None:
        b_y = _class_masses(labels, grid, at, o_k, K, COMPUTE)
    b_ff, _, b_s, _, b_sg = products(features, None, keys, grad_sums, at, o_k, K, C, CHUNK, COMPUTE)
    b_r = inverse_norm(b_ff)
    b_us = tl.zeros([BLOCK_P], COMPUTE)
    b_u = tl.zeros([BLOCK_P, BLOCK_K], COMPUTE)
    if memory is not None:
        b_s *= b_r[:, None]
        b_w = _weights(b_s, memory, noise, seed, grid, at, o_k, K)
        _, _, b_d, _, _ = products(grad_read, None, memory.value, None, at, o_k, K, D, CHUNK, COMPUTE)
        b_v = _centred(b_w, b_d, memory)
        b_u = load_or_zeros(grad_scores, at, o_k, K, COMPUTE) + b_v
        b_us += tl.sum(b_u * b_s, 1)
        _store_slots(for_keys, b_u * b_r[:, None], at, o_k, K)
        _store_slots(for_values, b_w, at, o_k, K)
        _store_slots(grad_noise, b_v, at, o_k, K)
    if labels is not None:
        b_us += tl.sum(b_y * b_sg, 1) * b_r
    if grad_features is not None:
        for i_c in tl.range(0, C, CHUNK, disable_licm=True):
            o_c = i_c + tl.arange(0, CHUNK)
            b_x = combine(b_u, keys, tl.zeros([BLOCK_P, CHUNK], COMPUTE), o_k, o_c, K, C)
            b_x = combine(b_y, grad_sums, b_x, o_k, o_c, K, C)
            if features is not None:
                b_f = load_block(features, at, o_c, C, COMPUTE)
                b_x = b_r[:, None] * (b_x - (b_us * b_r)[:, None] * b_f)
            store_block(grad_features, b_x, at, o_c, C)


@triton.jit
def _second_weights(b_w, b_d, b_h, b_c, memory):
    """t and q of docs/ops/memory_read.md from d, h and c."""
    b_d_mean, b_h_mean = tl.sum(b_w * b_d, 1)[:, None], tl.sum(b_w * b_h, 1)[:, None]
    b_mixed = (b_d * b_h - b_d * b_h_mean - b_h * b_d_mean) * scalar(memory.inverse_t, b_w.dtype)
    return _centred(b_w, b_h, memory), _centred(b_w, b_mixed + b_c, memory)


@triton.jit
def _turn(f, a, rows, more, at, o_k, K: tl.constexpr, C: tl.constexpr, CHUNK: tl.constexpr, COMPUTE: tl.constexpr):
    """r, beta, s = f^.rows and rho = r (a.rows - s beta + f.more), the derivative of s along a and ``more``."""
    b_ff, b_fa, b_s, b_rho, b_more = products(f, a, rows, more, at, o_k, K, C, CHUNK, COMPUTE)
    b_r = inverse_norm(b_ff)
    b_beta, b_s = b_fa * b_r, b_s * b_r[:, None]
    return b_r, b_beta, b_s, b_r[:, None] * (b_rho - b_s * b_beta[:, None] + b_more)


@triton.jit
def double_backward_kernel(
    grad_grad_features, grad_grad_keys, grad_grad_values, grad_grad_noise, grad_read, grad_scores, grad_sums,
    features, labels, memory, noise, seed,
    for_read, for_scores, for_features, for_noise, keys_a, keys_f, values_g, sums_a, sums_f, grid,
    K: tl.constexpr, C: tl.constexpr, D: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Gradients of what backward_kernel computes, with respect to all that it reads.

    ``keys_a`` to ``sums_f``, r u, r sigma, t, r y and r tau, are what those of keys, values and sums are summed with.
    """
    at, o_k = _locate(grid, tl.program_id(0), BLOCK_P), tl.arange(0, BLOCK_K)
    a, f, b_y, keys = grad_grad_features, features, None, None
    if labels is not None:
        b_y = _class_masses(labels, grid, at, o_k, K, COMPUTE)
    # sum of u s; f^.gamma + r kappa but for its last term
    b_us, b_along = tl.zeros([BLOCK_P], COMPUTE), tl.zeros([BLOCK_P], COMPUTE)
    b_u, b_sigma = tl.zeros([BLOCK_P, BLOCK_K], COMPUTE), tl.zeros([BLOCK_P, BLOCK_K], COMPUTE)
    b_tau = b_sigma
    if memory is not None:
        keys = memory.key
        b_r, b_beta, b_s, b_rho = _turn(f, a, keys, grad_grad_keys, at, o_k, K, C, CHUNK, COMPUTE)
        b_w = _weights(b_s, memory, noise, seed, grid, at, o_k, K)
        _, _, b_d, _, b_c = products(grad_read, None, memory.value, grad_grad_values, at, o_k, K, D, CHUNK, COMPUTE)
        b_h = b_rho + load_or_zeros(grad_grad_noise, at, o_k, K, COMPUTE)
        b_u = load_or_zeros(grad_scores, at, o_k, K, COMPUTE) + _centred(b_w, b_d, memory)
        b_t, b_q = _second_weights(b_w, b_d, b_h, b_c, memory)
        b_sigma = b_q - (b_r * b_beta)[:, None] * b_u
        b_us += tl.sum(b_u * b_s, 1)
        b_along += tl.sum(b_sigma * b_s + b_u * b_rho, 1)
        _store_slots(for_scores, b_rho, at, o_k, K)
        _store_slots(for_noise, b_q, at, o_k, K)
        if for_read is not None:
            for i_d in tl.range(0, D, CHUNK, disable_licm=True):
                o_d = i_d + tl.arange(0, CHUNK)
                b_o = combine(b_t, memory.value, tl.zeros([BLOCK_P, CHUNK], COMPUTE), o_k, o_d, K, D)
                store_block(for_read, combine(b_w, grad_grad_values, b_o, o_k, o_d, K, D), at, o_d, D)
        _store_slots(keys_a, b_u * b_r[:, None], at, o_k, K)
        _store_slots(keys_f, b_sigma * b_r[:, None], at, o_k, K)
        _store_slots(values_g, b_t, at, o_k, K)
    if labels is not None:
        b_r, b_beta, b_s, b_rho = _turn(f, a, grad_sums, None, at, o_k, K, C, CHUNK, COMPUTE)
        b_tau = -(b_r * b_beta)[:, None] * b_y
        b_us += tl.sum(b_y * b_s, 1)
        b_along += tl.sum(b_tau * b_s + b_y * b_rho, 1)
        _store_slots(sums_a, b_y * b_r[:, None], at, o_k, K)
        _store_slots(sums_f, b_tau * b_r[:, None], at, o_k, K)
    if for_features is not None:
        for i_c in tl.range(0, C, CHUNK, disable_licm=True):
            o_c = i_c + tl.arange(0, CHUNK)
            b_x = combine(b_sigma, keys, tl.zeros([BLOCK_P, CHUNK], COMPUTE), o_k, o_c, K, C)
            b_x = combine(b_u, grad_grad_keys, b_x, o_k, o_c, K, C)
            b_x = combine(b_tau, grad_sums, b_x, o_k, o_c, K, C)
            if a is not None:
                b_x -= (b_r * b_us)[:, None] * load_block(a, at, o_c, C, COMPUTE)
            b_x -= (b_r * (b_along - b_r * b_us * b_beta))[:, None] * load_block(f, at, o_c, C, COMPUTE)
            store_block(for_features, b_r[:, None] * b_x, at, o_c, C)
