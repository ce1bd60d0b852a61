"""The double backward of batch normalisation; formulas and arguments are those of ``pmm_fast/models/batchnorm.py``.

Its results are, in each channel, linear combinations of a, g and x - mean whose coefficients need three sums over the
batch: one kernel sums, one makes coefficients of the sums, one combines.  The maps are read twice and nothing of their
size is stored between, where plain PyTorch goes over them some thirty times.

Letters: as in ``_common.py``; a and g the incoming and the first gradient, mu and r mean and inverse deviation.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from pmm_fast.kernels._common import as_map, cast, compute_dtype, empty_map, resident_programs, triton_dtype
from torch import Tensor

# elements of a program's tile, by bytes of what is computed in; channels of one that lie side by side, or apart
_TILE = {4: 2048, 8: 1024}
_CHANNELS_LAST, _CHANNELS_APART = 64, 8
# rows of partial sums that are added up at once, and of channels
_ROWS, _COLUMNS = 64, 16
# coefficients of a channel: of a, x - mu and 1 in the gradient of g, of a, x - mu and 1 in that of x, whose coefficient
# of g is that of x - mu in the other
_COEFFICIENTS = 6


@triton.jit
def _load(m, i_b, o_p, o_c, mask, COMPUTE: tl.constexpr):
    p_tile = m.data + i_b.to(tl.int64) * m.b + o_p.to(tl.int64)[:, None] * m.p + o_c.to(tl.int64)[None, :] * m.c
    return tl.load(p_tile, mask=mask, other=0.0).to(COMPUTE)


@triton.jit
def _store(m, b_x, i_b, o_p, o_c, mask):
    p_tile = m.data + i_b.to(tl.int64) * m.b + o_p.to(tl.int64)[:, None] * m.p + o_c.to(tl.int64)[None, :] * m.c
    tl.store(p_tile, cast(b_x, m.data.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["images", "P"])
def sum_kernel(
    a, g, x, p_mean, p_sums, images, C, P,
    COMPUTE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Partial sums ``[3, programs, C]`` of a, a (x - mu) and a g."""
    i_program, programs = tl.program_id(0), tl.num_programs(0)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    b_mean = tl.load(p_mean + o_c, mask=m_c, other=0.0)
    b_a_sum = tl.zeros([BLOCK_P, BLOCK_C], COMPUTE)
    b_ax_sum, b_ag_sum = tl.zeros([BLOCK_P, BLOCK_C], COMPUTE), tl.zeros([BLOCK_P, BLOCK_C], COMPUTE)
    tiles = tl.cdiv(P, BLOCK_P)
    for i_tile in range(i_program, images * tiles, programs):
        i_b, o_p = i_tile // tiles, (i_tile % tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
        mask = (o_p < P)[:, None] & m_c[None, :]
        b_a = _load(a, i_b, o_p, o_c, mask, COMPUTE)
        b_g = _load(g, i_b, o_p, o_c, mask, COMPUTE)
        b_x = _load(x, i_b, o_p, o_c, mask, COMPUTE)
        b_a_sum += b_a
        b_ax_sum += b_a * (b_x - b_mean[None, :])
        b_ag_sum += b_a * b_g
    p_row = p_sums + i_program.to(tl.int64) * C + o_c
    size = programs.to(tl.int64) * C
    tl.store(p_row, tl.sum(b_a_sum, 0), mask=m_c)
    tl.store(p_row + size, tl.sum(b_ax_sum, 0), mask=m_c)
    tl.store(p_row + 2 * size, tl.sum(b_ag_sum, 0), mask=m_c)


@triton.jit
def _total(p_sums, programs, o_c, m_c, C, COMPUTE: tl.constexpr, ROWS: tl.constexpr):
    b_sum = tl.zeros([ROWS, o_c.shape[0]], COMPUTE)
    for i_row in range(0, programs, ROWS):
        o_row = i_row + tl.arange(0, ROWS)
        mask = (o_row < programs)[:, None] & m_c[None, :]
        b_sum += tl.load(p_sums + o_row.to(tl.int64)[:, None] * C + o_c[None, :], mask=mask, other=0.0)
    return tl.sum(b_sum, 0)


@triton.jit(do_not_specialize=["programs", "count"])
def coefficient_kernel(
    p_sums, p_b, p_c, p_weight, p_inverse, p_of_weight, p_of_bias, p_for_weight, p_coefficients, programs, count, C,
    COMPUTE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The gradient of the weight, and what the maps are combined with: ``[6, C]``; all else ``[C]``."""
    o_c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    m_c = o_c < C
    size = programs.to(tl.int64) * C
    n = count.to(COMPUTE)
    b_r = tl.load(p_inverse + o_c, mask=m_c, other=0.0)
    b_slope = tl.load(p_weight + o_c, mask=m_c, other=0.0) * b_r
    b_b, b_c = tl.load(p_b + o_c, mask=m_c, other=0.0), tl.load(p_c + o_c, mask=m_c, other=0.0)
    # means over the batch: of g x^ and g, of a, a x^ and a g
    b_s2 = tl.load(p_of_weight + o_c, mask=m_c, other=0.0) / n
    b_s1 = tl.load(p_of_bias + o_c, mask=m_c, other=0.0) / n
    b_a1 = _total(p_sums, programs, o_c, m_c, C, COMPUTE, ROWS) / n
    b_a2 = _total(p_sums + size, programs, o_c, m_c, C, COMPUTE, ROWS) * b_r / n
    b_q = _total(p_sums + 2 * size, programs, o_c, m_c, C, COMPUTE, ROWS) / n - b_a1 * b_s1 - b_a2 * b_s2
    b_h1 = b_b * b_s1 - b_slope * (b_a1 * b_s2 + b_a2 * b_s1)
    b_h2 = b_b * b_s2 - 2 * b_slope * b_a2 * b_s2
    tl.store(p_for_weight + o_c, b_r * b_q * n, mask=m_c)
    p_row = p_coefficients + o_c
    tl.store(p_row, b_slope, mask=m_c)
    tl.store(p_row + C, b_r * (b_b - b_slope * b_a2), mask=m_c)
    tl.store(p_row + 2 * C, b_c - b_slope * b_a1, mask=m_c)
    tl.store(p_row + 3 * C, -b_r * b_slope * b_s2, mask=m_c)
    tl.store(p_row + 4 * C, -b_r * b_r * (b_h2 + b_slope * b_q), mask=m_c)
    tl.store(p_row + 5 * C, -b_r * b_h1, mask=m_c)


@triton.jit(do_not_specialize=["images", "P"])
def combine_kernel(
    a, g, x, p_mean, p_coefficients, for_g, for_x, images, C, P,
    COMPUTE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The gradients of g and x."""
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    b_mean = tl.load(p_mean + o_c, mask=m_c, other=0.0)[None, :]
    p_row = p_coefficients + o_c
    b_g_a = tl.load(p_row, mask=m_c, other=0.0)[None, :]
    b_both = tl.load(p_row + C, mask=m_c, other=0.0)[None, :]
    b_g_1 = tl.load(p_row + 2 * C, mask=m_c, other=0.0)[None, :]
    b_x_a = tl.load(p_row + 3 * C, mask=m_c, other=0.0)[None, :]
    b_x_x = tl.load(p_row + 4 * C, mask=m_c, other=0.0)[None, :]
    b_x_1 = tl.load(p_row + 5 * C, mask=m_c, other=0.0)[None, :]
    tiles = tl.cdiv(P, BLOCK_P)
    for i_tile in range(tl.program_id(0), images * tiles, tl.num_programs(0)):
        i_b, o_p = i_tile // tiles, (i_tile % tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
        mask = (o_p < P)[:, None] & m_c[None, :]
        b_a = _load(a, i_b, o_p, o_c, mask, COMPUTE)
        b_g = _load(g, i_b, o_p, o_c, mask, COMPUTE)
        b_x = _load(x, i_b, o_p, o_c, mask, COMPUTE) - b_mean
        _store(for_g, b_g_a * b_a + b_both * b_x + b_g_1, i_b, o_p, o_c, mask)
        _store(for_x, b_x_a * b_a + b_both * b_g + b_x_x * b_x + b_x_1, i_b, o_p, o_c, mask)


def double_backward(
    of_x: Tensor,
    of_weight: Tensor,
    of_bias: Tensor,
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    inverse: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of ``grad``, ``x`` and ``weight``, the maps in the layout of ``x``."""
    images, channels, height, width = x.shape
    dtype, positions = compute_dtype(x.dtype), height * width
    for_grad, for_x = empty_map(x, channels), empty_map(x, channels)
    for_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    apart = for_x.stride(1) != 1
    block_c = min(_CHANNELS_APART if apart else _CHANNELS_LAST, triton.next_power_of_2(channels))
    block_p = _TILE[dtype.itemsize] // block_c
    splits, tiles = triton.cdiv(channels, block_c), images * triton.cdiv(positions, block_p)
    programs = max(1, min(tiles, 2 * resident_programs(x.device) // splits))
    meta = {"COMPUTE": triton_dtype(x.dtype)}
    blocks = {"BLOCK_P": block_p, "BLOCK_C": block_c}
    maps = (as_map(of_x), as_map(grad), as_map(x))
    vectors = [value.contiguous() for value in (of_weight, of_bias, weight, inverse, grad_weight, grad_bias)]
    mean = mean.contiguous()
    sums = torch.empty((3, programs, channels), dtype=dtype, device=x.device)
    coefficients = torch.empty((_COEFFICIENTS, channels), dtype=dtype, device=x.device)
    sum_kernel[programs, splits](*maps, mean, sums, images, channels, positions, **meta, **blocks)
    coefficient_kernel[triton.cdiv(channels, _COLUMNS),](
        *(sums, *vectors, for_weight, coefficients, programs, images * positions, channels),
        **meta,
        ROWS=_ROWS,
        COLUMNS=_COLUMNS,
    )
    results = (as_map(for_grad), as_map(for_x))
    combine_kernel[programs, splits](
        *(*maps, mean, coefficients, *results, images, channels, positions), **meta, **blocks
    )
    return for_grad, for_x, for_weight
