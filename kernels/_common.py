"""What the kernels share: their arguments, launching, and the functions that run on the device.

Letters: B images, C channels, D channels of the values, K slots or classes, P = h w positions of an image, H x W label
pixels.  Names inside kernels: i_ index of a program or block, o_ offsets, m_ mask, p_ pointer, b_ block in registers.
"""

from __future__ import annotations

import os
import struct
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# with debug, tl.device_assert is compiled in: a wrong label stops the kernel, and the host does not wait for it.  The
# checks of integer overflow that debug brings along are left out: they would follow every index computation
OPTIONS = {"debug": True, "sanitize_overflow": False}
# few, so that small inputs exercise the loops
_PROGRAMS_INTERPRETED = 3

# chunks of channels that are under way at once
_STAGES = tl.constexpr(4)
# two of them where there are more slots than these, whose rows would fill the shared memory
_FEW_SLOTS = tl.constexpr(64)
# below this squared norm a vector counts as zero
_ZERO_SQUARED_NORM = tl.constexpr(1e-24)


def interpreted() -> bool:
    """Whether Triton interprets the kernels on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


def _mend_interpreter() -> None:
    """Let the interpreter loop up to a scalar: it turns an array of one into an int, which NumPy 2.4 refuses."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def mended(tensor: Any, *scope: Any) -> None:
        patch(tensor, *scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    interpreter._patch_lang_tensor = mended


if interpreted():
    _mend_interpreter()
INTERPRETED = tl.constexpr(interpreted())


class Map(NamedTuple):
    """A map ``[B, C, P]`` with its strides."""

    data: Tensor
    b: int
    c: int
    p: int


class Labels(NamedTuple):
    """Labels ``[B, H, W]`` with their strides, and the label that does not count."""

    data: Tensor
    b: int
    y: int
    x: int
    ignore: int


class Axis(NamedTuple):
    """Bilinear sampling along an axis: index o lies at max(o * step + start, 0) / unit, between 0 and -minus_last.

    None of these is ever 1, which Triton makes a constant of, and then loses in a tuple within a tuple.
    """

    step: int
    start: int
    unit: int
    minus_last: int


@cache
def resident_programs(device: torch.device) -> int:
    """How many programs keep a device busy: two a multiprocessor hide each other's latency."""
    if device.type != "cuda":
        return _PROGRAMS_INTERPRETED
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count


def as_map(tensor: Tensor | None) -> Map | None:
    """A ``[B, C, h, w]`` as the kernels take it: in place where its positions have one stride, else copied."""
    if tensor is None:
        return None
    flat = tensor.flatten(2)
    return Map(flat, *flat.stride())


def as_labels(tensor: Tensor | None, ignore_index: int) -> Labels | None:
    """Labels as the kernels take them, in place."""
    if tensor is None:
        return None
    return Labels(tensor, *tensor.stride(), ignore_index)


def make_axis(step: int, start: int, unit: int, last: int) -> Axis:
    """Indices o at max(o * step + start, 0) / unit, between 0 and last."""
    return Axis(2 * step, 2 * start, 2 * unit, -last)


def aligned_axis(size_in: int, size_out: int) -> Axis:
    """``size_out`` samples of ``size_in`` points, corners on corners."""
    step = size_in - 1 if size_out > 1 else 0
    return make_axis(step, 0, size_out - 1 if step else max(size_out, 1), size_in - 1)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type that sums, norms and softmax are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    """The type that a kernel computes in for tensors of ``dtype``."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def scalar_bits(value: float) -> int:
    """A float64 as an int64: Triton would round a float argument to float32."""
    return struct.unpack("q", struct.pack("d", value))[0]


def empty_map(like: Tensor, channels: int) -> Tensor:
    """An uninitialised ``[B, channels, h, w]``, channels last where ``like`` is (and only is) that."""
    last = not like.is_contiguous() and like.is_contiguous(memory_format=torch.channels_last)
    return torch.empty(
        (like.shape[0], channels, *like.shape[2:]),
        dtype=like.dtype,
        device=like.device,
        memory_format=torch.channels_last if last else torch.contiguous_format,
    )


@triton.jit
def scalar(bits, COMPUTE: tl.constexpr):
    """The inverse of scalar_bits."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True).to(COMPUTE)


@triton.jit
def dot(b_x, b_y, b_sum=None):
    """Matrix product, as exact as the type: three passes of tf32 for float32.

    Triton does not compile every float64 product (its tensor cores take some layouts only), so that is written out; it
    needs small blocks.
    """
    if b_x.dtype == tl.float64:
        b_product = tl.sum(b_x[:, :, None] * b_y[None, :, :], 1)
        if b_sum is not None:
            b_product += b_sum
    else:
        b_product = tl.dot(b_x, b_y, b_sum, input_precision="tf32x3", out_dtype=b_x.dtype)
    return b_product


@triton.jit
def cast(b_x, DTYPE: tl.constexpr):
    """b_x in the type of an output, rounded to nearest, also where the interpreter would truncate to bfloat16."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        b_bits = b_x.to(tl.uint32, bitcast=True)
        b_bits = (b_bits + 0x7FFF + ((b_bits >> 16) & 1)) & 0xFFFF0000
        b_x = tl.where(b_x == b_x, b_bits.to(tl.float32, bitcast=True), b_x)
    return b_x.to(DTYPE)


@triton.jit
def block(m, at, o_c, C: tl.constexpr):
    """Addresses and mask of [BLOCK_P, BLOCK_C] elements of a map; ``at``: image, positions, their mask."""
    i_b, o_p, m_p = at
    p_image = m.data + i_b.to(tl.int64) * m.b
    p_block = p_image + o_p.to(tl.int64)[:, None] * m.p + o_c.to(tl.int64)[None, :] * m.c
    return p_block, m_p[:, None] & (o_c < C)[None, :]


@triton.jit
def load_block(m, at, o_c, C: tl.constexpr, COMPUTE: tl.constexpr):
    """[BLOCK_P, BLOCK_C] of a map, zeros outside it."""
    p_block, mask = block(m, at, o_c, C)
    return tl.load(p_block, mask=mask, other=0.0).to(COMPUTE)


@triton.jit
def load_or_zeros(m, at, o_c, C: tl.constexpr, COMPUTE: tl.constexpr):
    """load_block; zeros of a map that is None."""
    b_x = tl.zeros([at[1].shape[0], o_c.shape[0]], COMPUTE)
    if m is not None:
        b_x = load_block(m, at, o_c, C, COMPUTE)
    return b_x


@triton.jit
def store_block(m, b_x, at, o_c, C: tl.constexpr):
    """Write [BLOCK_P, BLOCK_C] of a map."""
    p_block, mask = block(m, at, o_c, C)
    tl.store(p_block, cast(b_x, m.data.dtype.element_ty), mask=mask)


@triton.jit
def load_rows(p_rows, o_k, o_c, K: tl.constexpr, C: tl.constexpr):
    """[BLOCK_K, BLOCK_C] of a contiguous [K, C], zeros outside it."""
    mask = (o_k < K)[:, None] & (o_c < C)[None, :]
    return tl.load(p_rows + o_k.to(tl.int64)[:, None] * C + o_c[None, :], mask=mask, other=0.0)


@triton.jit
def store_partial(p_sums, b_sums, i_program, o_k, o_c, K: tl.constexpr, C: tl.constexpr):
    """Write a program's [BLOCK_K, BLOCK_C] into [programs, K, C]."""
    p_rows = p_sums + (i_program.to(tl.int64) * K + o_k)[:, None] * C + o_c[None, :]
    tl.store(p_rows, b_sums, mask=(o_k < K)[:, None] & (o_c < C)[None, :])


@triton.jit
def products(
    x, y, p_rows, p_more, at, o_k, K: tl.constexpr, C: tl.constexpr, CHUNK: tl.constexpr, COMPUTE: tl.constexpr
):
    """x.x and x.y [BLOCK_P], products [BLOCK_P, BLOCK_K] of x and of y with rows, and of x with more rows.

    Maps are [B, C, P], rows [K, C]; one that is None counts as zeros.  All channels are visited, a chunk at a time: an
    operand of a product lies in registers as a whole, and the next chunks are on their way meanwhile.
    """
    STAGES: tl.constexpr = _STAGES if o_k.shape[0] <= _FEW_SLOTS else 2
    b_squares, b_pairs = tl.zeros([at[1].shape[0], CHUNK], COMPUTE), tl.zeros([at[1].shape[0], CHUNK], COMPUTE)
    b_x_rows = tl.zeros([at[1].shape[0], o_k.shape[0]], COMPUTE)
    b_y_rows, b_x_more = tl.zeros_like(b_x_rows), tl.zeros_like(b_x_rows)
    if x is not None:
        for i_c in tl.range(0, C, CHUNK, num_stages=STAGES):
            o_c = i_c + tl.arange(0, CHUNK)
            b_x = load_block(x, at, o_c, C, COMPUTE)
            b_squares += b_x * b_x
            if p_rows is not None:
                b_rows = tl.trans(load_rows(p_rows, o_k, o_c, K, C))
                b_x_rows = dot(b_x, b_rows, b_x_rows)
            if p_more is not None:
                b_x_more = dot(b_x, tl.trans(load_rows(p_more, o_k, o_c, K, C)), b_x_more)
            if y is not None:
                b_y = load_block(y, at, o_c, C, COMPUTE)
                b_pairs += b_x * b_y
                if p_rows is not None:
                    b_y_rows = dot(b_y, b_rows, b_y_rows)
    return tl.sum(b_squares, 1), tl.sum(b_pairs, 1), b_x_rows, b_y_rows, b_x_more


@triton.jit
def combine(b_u, p_rows, b_sum, o_k, o_c, K: tl.constexpr, C: tl.constexpr):
    """b_sum + sum_k u_k rows_k; rows that are None count as zeros."""
    if p_rows is not None:
        b_sum = dot(b_u, load_rows(p_rows, o_k, o_c, K, C), b_sum)
    return b_sum


@triton.jit
def squared_norm(b_x, m, at, C: tl.constexpr, CHUNK: tl.constexpr):
    """Squared norms [BLOCK_P] over all channels of a map, of which ``b_x`` is a program's block."""
    BLOCK_C: tl.constexpr = b_x.shape[1]
    if C <= BLOCK_C:
        b_sum = tl.sum(b_x * b_x, 1)
    else:
        b_sum = products(m, None, None, None, at, tl.arange(0, 16), 16, C, CHUNK, b_x.dtype)[0]
    return b_sum


@triton.jit
def inverse_norm(b_square):
    """1/||f|| from ||f||^2, 0 for a zero vector; NaN passes."""
    m_zero = b_square <= _ZERO_SQUARED_NORM
    return tl.where(m_zero, 0.0, tl.rsqrt(tl.where(m_zero, 1.0, b_square)))


@triton.jit
def load_label(labels, i_b, o_y, o_x, mask, K: tl.constexpr):
    """Classes at label pixels, -1 where there is none."""
    p_image = labels.data + i_b.to(tl.int64) * labels.b
    p_label = p_image + (o_y + tl.zeros_like(o_x)).to(tl.int64) * labels.y + o_x.to(tl.int64) * labels.x
    # compared as int64: a wrong label must not become a class by being cut to 32 bits
    b_label = tl.load(p_label, mask=mask, other=0).to(tl.int64)
    m_labelled = mask & (b_label != labels.ignore)
    m_class = m_labelled & (b_label >= 0) & (b_label < K)
    tl.device_assert(m_class | (m_labelled == 0), "a label is neither a class nor the ignore index")
    return tl.where(m_class, b_label, -1).to(tl.int32)


@triton.jit
def taps(axis, o, COMPUTE: tl.constexpr):
    """Lower index, upper index and the upper one's weight, exact: the position is a ratio of integers."""
    o_at = tl.maximum(o * axis.step + axis.start, 0)
    o_low = tl.minimum(o_at // axis.unit, -axis.minus_last)
    return o_low, tl.minimum(o_low + 1, -axis.minus_last), (o_at % axis.unit).to(COMPUTE) / axis.unit


@triton.jit
def gumbel(p_seed, o_row, BLOCK_K: tl.constexpr, COMPUTE: tl.constexpr):
    """Noise [BLOCK_P, BLOCK_K] of the positions with numbers ``o_row``: four slots a Philox counter."""
    GROUPS: tl.constexpr = BLOCK_K // 4
    o_group = tl.zeros([o_row.shape[0], GROUPS], tl.int32) + tl.arange(0, GROUPS)[None, :]
    b_low = (o_row & 0xFFFFFFFF).to(tl.uint32)[:, None] + tl.zeros([1, GROUPS], tl.uint32)
    b_high = (o_row >> 32).to(tl.uint32)[:, None] + tl.zeros([1, GROUPS], tl.uint32)
    b_0, b_1, b_2, b_3 = tl.philox(tl.load(p_seed), b_low, b_high, o_group, tl.zeros_like(o_group))
    # joining puts the new axis last, so the even words are paired first
    b_word = tl.reshape(tl.join(tl.join(b_0, b_2), tl.join(b_1, b_3)), [o_row.shape[0], BLOCK_K])
    b_uniform = ((b_word >> 9).to(COMPUTE) + 0.5) * 1.1920928955078125e-07
    return -tl.log(-tl.log(b_uniform))
