"""photometric on a GPU (formulas: docs/ops/photometric.md).

Four launches: the mean grey that contrast needs, the colours, the blur down the columns, the blur across and the
normalisation.  Without a blur the second is the last.

Letters: N images of P = h w pixels; else see _common.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from pmm_fast.kernels._common import OPTIONS
from torch import Tensor

# Pillow rounds products before they are added, so the compiler must not fuse the two
_OPTIONS = OPTIONS | {"enable_fp_fusion": False}
_BLOCK = 1024
# programs that add up the grey levels of an image
_PARTS = 32
_SIGMA = 8
# adding this leaves no room for a fraction: rounds to the nearest whole number, of at most 22 bits
_ROUND = tl.constexpr(12582912.0)


class Images(NamedTuple):
    """Images ``[N, 3, h, w]`` with their strides."""

    data: Tensor
    n: int
    c: int
    y: int
    x: int


@triton.jit
def _round(b_x):
    return (b_x + _ROUND) - _ROUND


@triton.jit
def _load(images, i_image, o_pixel, m_pixel, w):
    """Levels of three channels at pixels."""
    o_y, o_x = o_pixel // w, o_pixel % w
    p_image = images.data + i_image.to(tl.int64) * images.n
    p_pixel = p_image + o_y.to(tl.int64) * images.y + o_x.to(tl.int64) * images.x
    b_red = tl.load(p_pixel, mask=m_pixel, other=0).to(tl.float32)
    b_green = tl.load(p_pixel + images.c, mask=m_pixel, other=0).to(tl.float32)
    b_blue = tl.load(p_pixel + 2 * images.c, mask=m_pixel, other=0).to(tl.float32)
    return b_red, b_green, b_blue


@triton.jit
def _blend(b_degenerate, b_level, factor):
    b_moved = b_degenerate + (b_level - b_degenerate) * factor
    return tl.floor(tl.minimum(tl.maximum(b_moved, 0.0), 255.0))


@triton.jit
def _luminance(b_red, b_green, b_blue):
    # every product and sum is a whole number below 2^24
    return tl.floor((b_red * 19595.0 + b_green * 38470.0 + b_blue * 7471.0 + 32768.0) * (1.0 / 65536.0))


@triton.jit
def _lowered(b_value, b_amount, b_distance):
    """``b_distance`` of 85 below the value."""
    return b_value - _round(b_amount * tl.minimum(tl.maximum(b_distance, 0.0), 85.0) * (1.0 / 21675.0))


@triton.jit
def _turn_hue(b_red, b_green, b_blue, shift):
    """Through 8-bit hue, saturation and value, which are what Pillow's conversions give for every colour."""
    b_value = tl.maximum(tl.maximum(b_red, b_green), b_blue)
    b_least = tl.minimum(tl.minimum(b_red, b_green), b_blue)
    b_chroma = b_value - b_least
    b_part = tl.div_rn(b_value - (b_red + b_green + b_blue - b_value - b_least), tl.maximum(b_chroma, 1.0))
    # in sixths of the circle; between red and blue Pillow's comes from below zero, which rounds upwards
    b_corner = tl.where(b_red == b_value, 5.0000005, 5.0)
    b_corner = tl.where(b_blue == b_least, 1.0, tl.where(b_red == b_least, 3.0, b_corner))
    b_largest = tl.where(b_blue == b_least, b_red, tl.where(b_red == b_least, b_green, b_blue))
    b_sixths = tl.where(b_largest == b_value, b_corner - b_part, b_corner + b_part)
    b_hue = tl.floor(tl.div_rn(b_sixths, tl.zeros_like(b_sixths) + 6.0) * 255.0) + shift
    b_hue = tl.where(b_hue >= 256.0, b_hue - 256.0, b_hue)
    b_amount = b_value * tl.floor(tl.div_rn(b_chroma, tl.maximum(b_value, 1.0)) * 255.0)
    # how far each channel is below the value, of 85: the circle has 510 steps
    b_at = b_hue + b_hue
    return (
        _lowered(b_value, b_amount, 170.0 - tl.abs(b_at - 255.0)),
        _lowered(b_value, b_amount, tl.abs(b_at - 170.0) - 85.0),
        _lowered(b_value, b_amount, tl.abs(b_at - 340.0) - 85.0),
    )


@triton.jit
def _change(b_red, b_green, b_blue, p_look, grey, BEFORE_CONTRAST: tl.constexpr):
    """The operations of a look, or only those before contrast."""
    shift = tl.load(p_look + 7)
    # of a circle of 256 steps
    shift -= 256.0 * tl.floor(shift / 256.0)
    running = True
    for i_step in range(4):
        code = tl.load(p_look + i_step)
        if BEFORE_CONTRAST:
            running = running & (code != 1)
        if running & (code == 0):
            factor = tl.load(p_look + 4)
            b_red, b_green, b_blue = (
                _blend(0.0, b_red, factor),
                _blend(0.0, b_green, factor),
                _blend(0.0, b_blue, factor),
            )
        if running & (code == 1):
            factor = tl.load(p_look + 5)
            b_red, b_green = _blend(grey, b_red, factor), _blend(grey, b_green, factor)
            b_blue = _blend(grey, b_blue, factor)
        if running & (code == 2):
            factor, b_own = tl.load(p_look + 6), _luminance(b_red, b_green, b_blue)
            b_red, b_green = _blend(b_own, b_red, factor), _blend(b_own, b_green, factor)
            b_blue = _blend(b_own, b_blue, factor)
        if running & (code == 3):
            b_red, b_green, b_blue = _turn_hue(b_red, b_green, b_blue, shift)
    return b_red, b_green, b_blue


@triton.jit
def grey_kernel(images, looks, sums, size, w, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """``sums [N, PARTS]``: the grey levels that contrast sees, added up over a part of each image."""
    i_part, i_image = tl.program_id(0), tl.program_id(1)
    b_sum = tl.zeros([BLOCK], tl.int64)
    for i_pixel in range(i_part * BLOCK, size, PARTS * BLOCK):
        o_pixel = i_pixel + tl.arange(0, BLOCK)
        m_pixel = o_pixel < size
        b_red, b_green, b_blue = _load(images, i_image, o_pixel, m_pixel, w)
        b_red, b_green, b_blue = _change(b_red, b_green, b_blue, looks + i_image * 9, 0.0, True)
        b_sum += tl.where(m_pixel, _luminance(b_red, b_green, b_blue), 0.0).to(tl.int64)
    tl.store(sums + i_image * PARTS + i_part, tl.sum(b_sum))


@triton.jit
def _store(p_out, b_red, b_green, b_blue, i_image, o_pixel, m_pixel, size):
    p_red = p_out + i_image.to(tl.int64) * 3 * size + o_pixel
    tl.store(p_red, b_red.to(p_out.dtype.element_ty), mask=m_pixel)
    # step by step: twice the size may be too large for 32 bits, and a size of 1 is a constant that has no type
    p_green = p_red + size
    tl.store(p_green, b_green.to(p_out.dtype.element_ty), mask=m_pixel)
    tl.store(p_green + size, b_blue.to(p_out.dtype.element_ty), mask=m_pixel)


@triton.jit
def change_kernel(images, looks, greys, scale, shift, out, size, w, NORMALISE: tl.constexpr, BLOCK: tl.constexpr):
    """Colours: levels into ``out [N, 3, P]``, normalised if nothing follows."""
    i_image = tl.program_id(1)
    o_pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_pixel = o_pixel < size
    grey = 0.0
    if greys is not None:
        grey = tl.load(greys + i_image)
    b_red, b_green, b_blue = _load(images, i_image, o_pixel, m_pixel, w)
    b_red, b_green, b_blue = _change(b_red, b_green, b_blue, looks + i_image * 9, grey, False)
    if NORMALISE:
        b_red, b_green, b_blue = (
            b_red * scale[0] - shift[0],
            b_green * scale[1] - shift[1],
            b_blue * scale[2] - shift[2],
        )
    _store(out, b_red, b_green, b_blue, i_image, o_pixel, m_pixel, size)


@triton.jit
def _plane(weights, radii, size, CENTRE: tl.constexpr, BLOCK: tl.constexpr):
    """A program's plane and pixels: where the plane begins, its pixels, which there are, the centre tap, the radius."""
    i_plane = tl.program_id(1)
    o_pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    p_centre = weights + (i_plane // 3) * (2 * CENTRE + 1) + CENTRE
    return i_plane.to(tl.int64) * size, o_pixel, o_pixel < size, p_centre, tl.load(radii + i_plane // 3)


@triton.jit
def down_kernel(levels, weights, radii, out, size, h, w, CENTRE: tl.constexpr, BLOCK: tl.constexpr):
    """Blur of each plane down its columns; edge pixels are repeated."""
    p_plane, o_pixel, m_pixel, p_centre, radius = _plane(weights, radii, size, CENTRE, BLOCK)
    b_sum = tl.zeros([BLOCK], tl.float32)
    for i_tap in range(-radius, radius + 1):
        o_y = tl.minimum(tl.maximum(o_pixel // w + i_tap, 0), h - 1)
        b_level = tl.load(levels + p_plane + o_y * w + o_pixel % w, mask=m_pixel, other=0).to(tl.float32)
        b_sum += b_level * tl.load(p_centre + i_tap)
    tl.store(out + p_plane + o_pixel, b_sum, mask=m_pixel)


@triton.jit
def across_kernel(down, weights, radii, scale, shift, out, size, w, CENTRE: tl.constexpr, BLOCK: tl.constexpr):
    """Blur of each plane across its rows, rounded and normalised."""
    p_plane, o_pixel, m_pixel, p_centre, radius = _plane(weights, radii, size, CENTRE, BLOCK)
    b_sum = tl.zeros([BLOCK], tl.float32)
    for i_tap in range(-radius, radius + 1):
        o_x = tl.minimum(tl.maximum(o_pixel % w + i_tap, 0), w - 1)
        b_level = tl.load(down + p_plane + (o_pixel // w) * w + o_x, mask=m_pixel, other=0.0)
        b_sum += b_level * tl.load(p_centre + i_tap)
    i_channel = tl.program_id(1) % 3
    factor = tl.where(i_channel == 0, scale[0], tl.where(i_channel == 1, scale[1], scale[2]))
    offset = tl.where(i_channel == 0, shift[0], tl.where(i_channel == 1, shift[1], shift[2]))
    tl.store(out + p_plane + o_pixel, _round(b_sum) * factor - offset, mask=m_pixel)


def _taps(looks: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Weights ``[N, 2 most + 1]`` around their centre and radii ``[N]`` of the blurs, on the device."""
    sigma = looks[:, _SIGMA, None].double()
    radius = (4 * sigma + 0.5).floor().clamp(max=most)
    offset = torch.arange(-most, most + 1, device=looks.device)
    # the one tap of a radius of 0 is 1 whatever sigma is, which may be 0
    taps = torch.exp(-0.5 * (offset / torch.where(radius > 0, sigma, 1.0)) ** 2) * (offset.abs() <= radius)
    return (taps / taps.sum(1, keepdim=True)).float(), radius[:, 0].int()


def forward(
    images: Tensor,
    looks: Tensor,
    scale: Sequence[float],
    shift: Sequence[float],
    radius: int,
    contrast: bool,
    out: Tensor,
) -> None:
    """Write ``level * scale - shift`` of each channel to ``out``.

    No look's blur has more than ``radius``, and none has contrast unless ``contrast`` says that one may.
    """
    n, _, h, w = images.shape
    size, grid = h * w, (triton.cdiv(h * w, _BLOCK), n)
    given, scale, shift = Images(images, *images.stride()), tuple(scale), tuple(shift)
    greys = None
    if contrast:
        sums = torch.empty((n, _PARTS), dtype=torch.int64, device=images.device)
        grey_kernel[_PARTS, n](given, looks, sums, size, w, PARTS=_PARTS, BLOCK=_BLOCK, **_OPTIONS)
        # in whole numbers: a GPU divides by a number with its reciprocal, which misses a mean that is half a level
        greys = ((2 * sums.sum(1) + size) // (2 * size)).float()
    levels = torch.empty_like(out, dtype=torch.uint8) if radius else out
    change_kernel[grid](
        given, looks, greys, scale, shift, levels, size, w, NORMALISE=radius == 0, BLOCK=_BLOCK, **_OPTIONS
    )
    if radius:
        (weights, radii), down, planes = _taps(looks, radius), torch.empty_like(out), (grid[0], 3 * n)
        down_kernel[planes](levels, weights, radii, down, size, h, w, CENTRE=radius, BLOCK=_BLOCK, **_OPTIONS)
        across_kernel[planes](down, weights, radii, scale, shift, out, size, w, CENTRE=radius, BLOCK=_BLOCK, **_OPTIONS)
