"""Mean cross-entropy of upsampled logits on a GPU; nothing of the size of the upsampled logits is stored.

A program walks down the pixels of a row of cells (docs/ops/upsample_cross_entropy.md): the logits at the cells' upper
and lower ends, interpolated along the row, stay in registers, and a pixel row costs one multiply-add a class.  Classes
lie along the second axis of a block, so that a thread holds all classes of a pixel; K is a constant of the kernel, and
the padding of the class axis costs nothing.

Letters: B images, K classes, h x w logits, H x W label pixels; else see _common.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from pmm_fast.kernels._common import (
    OPTIONS,
    Axis,
    Map,
    aligned_axis,
    as_labels,
    as_map,
    cast,
    compute_dtype,
    dot,
    empty_map,
    load_label,
    make_axis,
    resident_programs,
    taps,
    triton_dtype,
)
from torch import Tensor

_MOST_COLUMNS = 30
# pixels of a program at a time: one a thread; backward, whose products hold an operand of all of them, has one warp
_PIXELS_FORWARD, _PIXELS_BACKWARD = 128, 32
_MOST_ROWS = 8


class Geometry(NamedTuple):
    """Sampling along both axes, source height and width, label height and width."""

    rows: Axis
    columns: Axis
    h: int
    w: int
    height: int
    width: int


@triton.jit
def _first(axis, i_cell, size):
    """The first output index of a cell."""
    # a step of 0 has one cell, the first, and a unit of the whole size
    step = tl.maximum(axis.step, 1)
    i_at = (i_cell * axis.unit - axis.start + step - 1) // step
    return tl.where(i_cell <= 0, 0, tl.minimum(tl.maximum(i_at, 0), size))


@triton.jit
def _load_row(m, i_b, i_row, geometry, o_x, o_k, K: tl.constexpr, COMPUTE: tl.constexpr):
    """[BLOCK_X, BLOCK_K]: a row of the source interpolated at output columns."""
    o_left, o_right, b_across = taps(geometry.columns, o_x, COMPUTE)
    p_row = m.data + i_b.to(tl.int64) * m.b + o_k.to(tl.int64)[None, :] * m.c
    o_row = (i_row * geometry.w + tl.zeros_like(o_x)).to(tl.int64)
    m_k = (o_k < K)[None, :]
    b_left = tl.load(p_row + ((o_row + o_left) * m.p)[:, None], mask=m_k, other=0.0).to(COMPUTE)
    b_right = tl.load(p_row + ((o_row + o_right) * m.p)[:, None], mask=m_k, other=0.0).to(COMPUTE)
    return b_left + b_across[:, None] * (b_right - b_left)


@triton.jit
def _load_ends(m, i_b, i_cell, geometry, o_x, o_k, K: tl.constexpr, COMPUTE: tl.constexpr):
    """Upper end of a row of cells, and lower minus upper end."""
    b_upper = _load_row(m, i_b, i_cell, geometry, o_x, o_k, K, COMPUTE)
    tl.debug_barrier()
    i_below = tl.minimum(i_cell + 1, -geometry.rows.minus_last)
    return b_upper, _load_row(m, i_b, i_below, geometry, o_x, o_k, K, COMPUTE) - b_upper


@triton.jit
def _down(axis, i_y, i_cell, COMPUTE: tl.constexpr):
    """The weight of the lower end at an output row of a cell."""
    return tl.maximum(i_y * axis.step + axis.start - i_cell * axis.unit, 0).to(COMPUTE) / axis.unit


@triton.jit
def _exponentials(b_upper, b_rise, b_down, o_k, K: tl.constexpr):
    """exp(z - max z), max z and z at a row of pixels."""
    b_z = tl.where((o_k < K)[None, :], b_upper + b_down * b_rise, float("-inf"))
    b_max = tl.max(b_z, 1)
    return tl.where((o_k < K)[None, :], tl.exp(b_z - b_max[:, None]), 0.0), b_max, b_z


@triton.jit
def forward_kernel(
    logits, labels, losses, counts, geometry,
    K: tl.constexpr, COMPUTE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    """Sum of losses and number of labelled pixels of BLOCK_X columns of a row of cells."""
    i_row, i_x = tl.program_id(0), tl.program_id(1)
    i_b, i_cell = i_row // geometry.h, i_row % geometry.h
    o_k, o_x = tl.arange(0, BLOCK_K), i_x * BLOCK_X + tl.arange(0, BLOCK_X)
    b_upper, b_rise = _load_ends(logits, i_b, i_cell, geometry, o_x, o_k, K, COMPUTE)
    b_loss, b_count = tl.zeros([BLOCK_X], COMPUTE), tl.zeros([BLOCK_X], COMPUTE)
    end = _first(geometry.rows, i_cell + 1, geometry.height)
    for i_y in range(_first(geometry.rows, i_cell, geometry.height), end):
        b_label = load_label(labels, i_b, i_y, o_x, o_x < geometry.width, K)
        b_down = _down(geometry.rows, i_y, i_cell, COMPUTE)
        b_e, b_max, b_z = _exponentials(b_upper, b_rise, b_down, o_k, K)
        b_own = tl.sum(tl.where(o_k[None, :] == b_label[:, None], b_z, 0.0), 1)
        b_loss += tl.where(b_label >= 0, b_max + tl.log(tl.sum(b_e, 1)) - b_own, 0.0)
        b_count += tl.where(b_label >= 0, 1.0, 0.0)
    i_partial = i_row * tl.num_programs(1) + i_x
    tl.store(losses + i_partial, tl.sum(b_loss))
    tl.store(counts + i_partial, tl.sum(b_count))


@triton.jit
def finish_kernel(losses, counts, loss, count, size, BLOCK: tl.constexpr):
    """The mean from the partial sums, in a fixed order; one program."""
    b_loss, b_count = tl.zeros([BLOCK], loss.dtype.element_ty), tl.zeros([BLOCK], loss.dtype.element_ty)
    for i_block in range(0, size, BLOCK):
        o_partial = i_block + tl.arange(0, BLOCK)
        b_loss += tl.load(losses + o_partial, mask=o_partial < size, other=0.0)
        b_count += tl.load(counts + o_partial, mask=o_partial < size, other=0.0)
    b_total = tl.maximum(tl.sum(b_count), 1.0)
    tl.store(count, b_total)
    tl.store(loss, tl.sum(b_loss) / b_total)


@triton.jit
def _cell_sums(
    logits, grad_grad, labels, geometry, i_b, i_cell, o_x, m_own, o_k, K: tl.constexpr, COMPUTE: tl.constexpr
):
    """What a row of cells adds to its ends, [BLOCK_X, BLOCK_K] each, and its share of the slope along ``grad_grad``.

    The summand of a pixel is p - [k = label]; with ``grad_grad`` a, its derivative along a, p (a - sum p a).
    """
    b_upper, b_rise = _load_ends(logits, i_b, i_cell, geometry, o_x, o_k, K, COMPUTE)
    if grad_grad is not None:
        tl.debug_barrier()
        b_a_upper, b_a_rise = _load_ends(grad_grad, i_b, i_cell, geometry, o_x, o_k, K, COMPUTE)
    b_all, b_low = tl.zeros_like(b_upper), tl.zeros_like(b_upper)
    tl.debug_barrier()
    b_slope, m_k = tl.zeros([o_x.shape[0]], COMPUTE), (o_k < K)[None, :]
    end = _first(geometry.rows, i_cell + 1, geometry.height)
    for i_y in range(_first(geometry.rows, i_cell, geometry.height), end):
        b_label = load_label(labels, i_b, i_y, o_x, o_x < geometry.width, K)
        b_down = _down(geometry.rows, i_y, i_cell, COMPUTE)
        b_e, _, _ = _exponentials(b_upper, b_rise, b_down, o_k, K)
        b_p = tl.where((b_label >= 0)[:, None], b_e * (1 / tl.sum(b_e, 1))[:, None], 0.0)
        m_label = (o_k[None, :] == b_label[:, None]) & m_k
        if grad_grad is not None:
            b_a = b_a_upper + b_down * b_a_rise
            b_mean = tl.sum(tl.where(m_k, b_p * b_a, 0.0), 1)
            b_slope += tl.where(m_own, b_mean - tl.sum(tl.where(m_label, b_a, 0.0), 1), 0.0)
            b_dz = b_p * (b_a - b_mean[:, None])
        else:
            b_dz = b_p - tl.where(m_label, 1.0, 0.0)
        b_all += b_dz
        b_low += b_down * b_dz
    return tl.where(m_k, b_all - b_low, 0.0), tl.where(m_k, b_low, 0.0), b_slope


@triton.jit
def backward_kernel(
    grad_loss, grad_grad, logits, labels, count, grad_logits, slopes, geometry, rows, columns,
    K: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Gradient at rows x columns positions, gathered from all cells that end at them.

    With ``grad_grad``: the gradient of that gradient, and in ``slopes`` the loss's slope along ``grad_grad``.
    """
    i_tile, i_column = tl.program_id(0), tl.program_id(1)
    tiles = tl.cdiv(geometry.h, rows)
    i_b, i_top, i_left = i_tile // tiles, (i_tile % tiles) * rows, i_column * columns
    o_k, o_j = tl.arange(0, BLOCK_K), i_left + tl.arange(0, BLOCK_J)
    m_own = (o_k < K)[None, :] & ((o_j < geometry.w) & (o_j < i_left + columns))[:, None]
    b_scale = tl.load(grad_loss).to(COMPUTE) / tl.load(count)
    b_slope, b_carry = tl.zeros([BLOCK_X], COMPUTE), tl.zeros([BLOCK_J, BLOCK_K], COMPUTE)
    i_start = _first(geometry.columns, i_left - 1, geometry.width)
    i_end = _first(geometry.columns, tl.minimum(i_left + columns, geometry.w), geometry.width)
    for i_cell in tl.range(tl.maximum(i_top - 1, 0), tl.minimum(i_top + rows, geometry.h), disable_licm=True):
        b_upper, b_lower = b_carry, tl.zeros([BLOCK_J, BLOCK_K], COMPUTE)
        for i_x in tl.range(i_start, i_end, BLOCK_X):
            o_x = i_x + tl.arange(0, BLOCK_X)
            o_low, o_high, b_across = taps(geometry.columns, o_x, COMPUTE)
            # the cells of a program's first row and column count where they belong
            m_cell = (i_cell >= i_top) & (o_low >= i_left) & (o_x < i_end)
            b_up, b_down, b_part = _cell_sums(
                logits, grad_grad, labels, geometry, i_b, i_cell, o_x, m_cell, o_k, K, COMPUTE
            )
            b_weight = tl.where(o_low[None, :] == o_j[:, None], (1 - b_across)[None, :], 0.0)
            b_weight += tl.where(o_high[None, :] == o_j[:, None], b_across[None, :], 0.0)
            b_upper, b_lower = dot(b_weight, b_up, b_upper), dot(b_weight, b_down, b_lower)
            b_slope += b_part
        # the last row of cells has both ends in the last row of positions
        b_sum = b_scale * (b_upper + tl.where(i_cell == -geometry.rows.minus_last, b_lower, 0.0))
        b_carry = b_lower
        o_position = (i_cell * geometry.w + o_j).to(tl.int64) * grad_logits.p
        p_sum = grad_logits.data + i_b.to(tl.int64) * grad_logits.b + o_k.to(tl.int64)[None, :] * grad_logits.c
        b_sum = cast(b_sum, grad_logits.data.dtype.element_ty)
        tl.store(p_sum + o_position[:, None], b_sum, mask=m_own & (i_cell >= i_top))
    if slopes is not None:
        tl.store(slopes + i_tile * tl.num_programs(1) + i_column, tl.sum(b_slope))


def _axis(size_in: int, size_out: int, align_corners: bool) -> Axis:
    if align_corners:
        return aligned_axis(size_in, size_out)
    return make_axis(2 * size_in, size_in - size_out, 2 * size_out, size_in - 1)


def _measure(logits: Tensor, labels: Tensor, align_corners: bool, pixels: int) -> tuple[Geometry, dict[str, Any]]:
    """Where pixels lie, and the constants of a launch; a program takes as many ``pixels`` at a time if classes are few.

    A thread holds all classes of a pixel as long as they fit; a float64 product needs the smallest blocks.
    """
    (_, classes, h, w), (_, height, width) = logits.shape, labels.shape
    rows, columns = _axis(h, height, align_corners), _axis(w, width, align_corners)
    block_k = max(16, triton.next_power_of_2(classes))
    block_x = 16 if logits.dtype == torch.float64 else max(16, min(pixels, 32 * pixels // block_k))
    warps = max(1, block_x * block_k // 1024)
    meta = {"K": classes, "COMPUTE": triton_dtype(logits.dtype), "BLOCK_K": block_k, "BLOCK_X": block_x}
    return Geometry(rows, columns, h, w, height, width), {**OPTIONS, "num_warps": warps, "num_stages": 1, **meta}


def forward(logits: Tensor, labels: Tensor, ignore_index: int, align_corners: bool) -> tuple[Tensor, Tensor]:
    """The loss and n, the labelled pixels (at least 1), of ``logits [B, K, h, w]`` and ``labels [B, H, W]``."""
    dtype = compute_dtype(logits.dtype)
    if logits.numel() == 0 or labels.numel() == 0:
        return logits.new_zeros((), dtype=dtype), logits.new_ones((), dtype=dtype)
    geometry, meta = _measure(logits, labels, align_corners, _PIXELS_FORWARD)
    grid = (logits.shape[0] * geometry.h, triton.cdiv(geometry.width, meta["BLOCK_X"]))
    losses, counts = torch.empty((2, grid[0] * grid[1]), dtype=dtype, device=logits.device)
    # apart, since what an operator returns may not share memory
    loss, count = logits.new_empty((), dtype=dtype), logits.new_empty((), dtype=dtype)
    forward_kernel[grid](as_map(logits), as_labels(labels, ignore_index), losses, counts, geometry, **meta)
    finish_kernel[1,](losses, counts, loss, count, len(losses), BLOCK=4096, num_warps=16)
    return loss, count


def _gather(
    grad_loss: Tensor,
    grad_grad: Map | None,
    logits: Tensor,
    labels: Tensor,
    count: Tensor,
    ignore_index: int,
    align_corners: bool,
) -> tuple[Tensor, Tensor | None]:
    """Run :func:`backward_kernel`; its gradient and, with ``grad_grad``, the partial slopes."""
    gradient = empty_map(logits, logits.shape[1])
    if logits.numel() == 0 or labels.numel() == 0:
        return gradient.zero_(), None
    geometry, meta = _measure(logits, labels, align_corners, _PIXELS_BACKWARD)
    # sixteen columns, of which the first also belongs to the neighbour; half as many where each has many pixels
    cell = geometry.columns.unit / max(geometry.columns.step, 1)
    pixels = meta["BLOCK_X"] * max(1, round(max(8 * cell, min(16 * cell, 128)) / meta["BLOCK_X"]))
    most = 14 if logits.dtype == torch.float64 else _MOST_COLUMNS
    columns = max(1, min(most, _MOST_COLUMNS, geometry.w, int((pixels - 1) / cell) - 1))
    # the cells above a tile are visited twice: high tiles, as long as there are eight programs a multiprocessor
    tiles = logits.shape[0] * geometry.h * triton.cdiv(geometry.w, columns)
    rows = max(1, min(_MOST_ROWS, tiles // (4 * resident_programs(logits.device))))
    grid = (logits.shape[0] * triton.cdiv(geometry.h, rows), triton.cdiv(geometry.w, columns))
    slopes = None if grad_grad is None else count.new_empty((grid[0] * grid[1],))
    backward_kernel[grid](
        *(grad_loss, grad_grad, as_map(logits), as_labels(labels, ignore_index), count, as_map(gradient), slopes),
        *(geometry, rows, columns),
        **meta,
        BLOCK_J=max(16, triton.next_power_of_2(columns)),
    )
    return gradient, slopes


def backward(
    grad_loss: Tensor, logits: Tensor, labels: Tensor, count: Tensor, ignore_index: int, align_corners: bool
) -> Tensor:
    """The gradient of ``logits`` from the scalars ``grad_loss`` and ``count``."""
    return _gather(grad_loss, None, logits, labels, count, ignore_index, align_corners)[0]


def double_backward(
    grad_grad_logits: Tensor,
    grad_loss: Tensor,
    logits: Tensor,
    labels: Tensor,
    count: Tensor,
    ignore_index: int,
    align_corners: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of ``grad_loss`` and ``logits`` from that of :func:`backward`'s result."""
    incoming = as_map(grad_grad_logits)
    for_logits, slopes = _gather(grad_loss, incoming, logits, labels, count, ignore_index, align_corners)
    return (torch.zeros_like(grad_loss) if slopes is None else slopes.sum() / count), for_logits
