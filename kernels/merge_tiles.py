"""Logits of overlapping tiles to one map or straight to classes, on a GPU (formulas: docs/ops/merge_tiles.md).

A program has neighbouring pixels of a row.  It adds up the tiles that cover them, a block of classes at a time, and
keeps the best class so far and the sum of a softmax relative to it; nothing else is stored.

Letters: T tiles, K classes, h x w logits, H x W pixels; else see _common.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from pmm_fast.kernels._common import OPTIONS, Axis, aligned_axis, taps, triton_dtype
from torch import Tensor

_BLOCK_X = 128
_MOST_BLOCK_K = 16


class Tiles(NamedTuple):
    """Logits ``[T, K, h, w]`` with their strides."""

    data: Tensor
    t: int
    k: int
    y: int
    x: int


class Geometry(NamedTuple):
    """Sampling down and across a tile, its size and the size of the image."""

    rows: Axis
    columns: Axis
    tile_height: int
    tile_width: int
    image_height: int
    image_width: int


@triton.jit
def _row(p_row, x, o_low, o_high, b_right, mask, COMPUTE: tl.constexpr):
    """Rows of logits ``p_row [BLOCK_K, 1]`` between two columns."""
    b_left = tl.load(p_row + o_low.to(tl.int64)[None, :] * x, mask=mask, other=0.0).to(COMPUTE)
    b_far = tl.load(p_row + o_high.to(tl.int64)[None, :] * x, mask=mask, other=0.0).to(COMPUTE)
    return b_left + b_right[None, :] * (b_far - b_left)


@triton.jit
def _average(logits, places, geometry, i_y, o_x, o_k, T, K: tl.constexpr, COMPUTE: tl.constexpr):
    """[BLOCK_K, BLOCK_X] of the average at pixels of a row."""
    b_sum, b_count = tl.zeros([o_k.shape[0], o_x.shape[0]], COMPUTE), tl.zeros([o_x.shape[0]], COMPUTE)
    p_tile = logits.data + o_k.to(tl.int64)[:, None] * logits.k
    for i_t in range(T):
        o_down = i_y - tl.load(places + i_t).to(tl.int32)
        o_across = o_x - tl.load(places + T + i_t).to(tl.int32)
        if (o_down >= 0) & (o_down < geometry.tile_height):
            m_x = (o_across >= 0) & (o_across < geometry.tile_width) & (o_x < geometry.image_width)
            mask = (o_k < K)[:, None] & m_x[None, :]
            o_upper, o_lower, b_down = taps(geometry.rows, o_down, COMPUTE)
            o_low, o_high, b_right = taps(geometry.columns, o_across, COMPUTE)
            p_upper = p_tile + o_upper.to(tl.int64) * logits.y
            p_lower = p_tile + o_lower.to(tl.int64) * logits.y
            b_upper = _row(p_upper, logits.x, o_low, o_high, b_right, mask, COMPUTE)
            b_lower = _row(p_lower, logits.x, o_low, o_high, b_right, mask, COMPUTE)
            b_sum += b_upper + b_down * (b_lower - b_upper)
            b_count += tl.where(m_x, 1, 0)
        p_tile += logits.t
    # pixels beyond the image have no tile
    return b_sum / tl.maximum(b_count, 1.0)[None, :]


@triton.jit
def _best_of(b_z, o_k):
    """The largest of each column and its first class; a NaN is larger than all that is none."""
    m_nan = b_z != b_z
    b_most = tl.max(tl.where(m_nan, float("-inf"), b_z), 0)
    m_any = tl.max(m_nan.to(tl.int32), 0) > 0
    m_best = tl.where(m_any[None, :], m_nan, b_z == b_most[None, :])
    b_at = tl.min(tl.where(m_best, o_k[:, None], 1 << 30), 0)
    return tl.where(m_any, float("nan"), b_most), b_at


@triton.jit
def merge_kernel(
    logits, places, average, classes, confidence, geometry, T,
    K: tl.constexpr, COMPUTE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    """The average of a row's pixels, or their classes and, unless it is None, the confidence."""
    i_y, o_x = tl.program_id(0), tl.program_id(1) * BLOCK_X + tl.arange(0, BLOCK_X)
    m_x = o_x < geometry.image_width
    o_pixel = i_y.to(tl.int64) * geometry.image_width + o_x
    b_best, b_class = tl.full([BLOCK_X], float("-inf"), COMPUTE), tl.zeros([BLOCK_X], tl.int32)
    b_total = tl.zeros([BLOCK_X], COMPUTE)
    for i_k in range(0, K, BLOCK_K):
        o_k = i_k + tl.arange(0, BLOCK_K)
        b_z = _average(logits, places, geometry, i_y, o_x, o_k, T, K, COMPUTE)
        if average is not None:
            # step by step: a size of 1 is a constant that has no type
            o_class = o_k.to(tl.int64) * geometry.image_height * geometry.image_width
            p_out = average + o_class[:, None] + o_pixel[None, :]
            tl.store(p_out, b_z.to(tl.float32), mask=(o_k < K)[:, None] & m_x[None, :])
        else:
            b_z = tl.where((o_k < K)[:, None], b_z, float("-inf"))
            b_most, b_at = _best_of(b_z, o_k)
            m_taken = ((b_most > b_best) | (b_most != b_most)) & (b_best == b_best)
            b_larger = tl.where(m_taken, b_most, b_best)
            b_total = b_total * tl.exp(b_best - b_larger) + tl.sum(tl.exp(b_z - b_larger[None, :]), 0)
            b_class = tl.where(m_taken, b_at, b_class)
            b_best = b_larger
    if classes is not None:
        tl.store(classes + o_pixel, b_class.to(tl.uint8), mask=m_x)
    if confidence is not None:
        tl.store(confidence + o_pixel, (1.0 / b_total).to(tl.float32), mask=m_x)


def forward(
    logits: Tensor,
    places: Tensor,
    tile: Sequence[int],
    size: Sequence[int],
    average: Tensor,
    classes: Tensor,
    confidence: Tensor,
) -> None:
    """Write those of the results that have elements; ``places [2, T]`` are tops and lefts."""
    tiles, count, height, width = logits.shape
    geometry = Geometry(aligned_axis(height, tile[0]), aligned_axis(width, tile[1]), *tile, *size)
    results = [out if out.numel() else None for out in (average, classes, confidence)]
    block_k = min(_MOST_BLOCK_K, triton.next_power_of_2(count))
    merge_kernel[size[0], triton.cdiv(size[1], _BLOCK_X)](
        *(Tiles(logits, *logits.stride()), places, *results, geometry, tiles),
        K=count,
        COMPUTE=triton_dtype(logits.dtype),
        BLOCK_K=block_k,
        BLOCK_X=_BLOCK_X,
        **OPTIONS,
    )
