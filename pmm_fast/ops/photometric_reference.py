"""photometric in plain PyTorch: what the operator means.

Levels are float32 ``[3, h, w]``, whole numbers in 0..255, as they would stand in an 8-bit image.  Formulas:
docs/ops/photometric.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pmm_fast.ops.looks import (
    BRIGHTNESS,
    CONTRAST,
    FACTORS,
    HUE,
    ORDER,
    SATURATION,
    SHIFT,
    SIGMA,
    blur_radius,
    read_looks,
)


def photometric(images: Tensor, looks: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """See :func:`pmm_fast.ops.photometric`.  Waits for a GPU that ``looks`` is on."""
    out = torch.empty(images.shape, dtype=torch.float32, device=images.device)
    for image, look, result in zip(images, read_looks("photometric", looks), out, strict=True):
        if image.numel() == 0:
            continue
        levels = image.float()
        for operation in look[ORDER]:
            levels = change(levels, int(operation), look)
        levels = gaussian_blur(levels, look[SIGMA])
        for channel, level, of_mean, of_std in zip(result, levels, mean, std, strict=True):
            torch.sub(level * (1 / (255 * of_std)), of_mean / of_std, out=channel)
    return out


def change(levels: Tensor, operation: int, look: Sequence[float]) -> Tensor:
    """Levels after one operation of a look; -1 is none."""
    brightness, contrast, saturation = look[FACTORS]
    if operation == BRIGHTNESS:
        return blend(torch.zeros_like(levels), levels, brightness)
    if operation == CONTRAST:
        # in whole numbers: a GPU divides by a number with its reciprocal, which misses a mean that is half a level
        grey = luminance(levels).long()
        grey = ((2 * grey.sum() + grey.numel()) // (2 * grey.numel())).float()
        return blend(grey, levels, contrast)
    if operation == SATURATION:
        return blend(luminance(levels), levels, saturation)
    if operation == HUE:
        return shift_hue(levels, int(look[SHIFT]))
    return levels


def blend(degenerate: Tensor, levels: Tensor, factor: float) -> Tensor:
    """Away from ``degenerate`` by ``factor``: cut off to whole levels, each step rounded to float32."""
    return (degenerate + factor * (levels - degenerate)).clamp(0, 255).floor()


def luminance(levels: Tensor) -> Tensor:
    """The grey level of each pixel, ``[h, w]``: weights in units of 1/65536, rounded."""
    red, green, blue = levels.int()
    return ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16).float()


def shift_hue(levels: Tensor, shift: int) -> Tensor:
    """Turn the hue by ``shift`` of 256 steps, through 8-bit hue, saturation and value."""
    red, green, _ = levels
    value, least = levels.amax(0), levels.amin(0)
    chroma = value - least
    divisor = chroma.clamp(min=1)
    # float32 where Pillow rounds to it: a hue that is nearly a whole number depends on that
    from_red, from_green, from_blue = (((value - level) / divisor).double() for level in levels)
    # in sixths of the circle; the largest channel says where, red before green before blue
    sixths = torch.where(green == value, 2 + from_red - from_blue, 4 + from_green - from_red)
    sixths = torch.where(red == value, from_blue - from_green, sixths).float()
    hue = torch.where(chroma == 0, 0, (sixths.double() / 6 + 1).remainder(1).float())
    hue = ((hue.double() * 255).floor() + shift).remainder(256).float()
    saturation = (chroma / value.clamp(min=1) * 255).floor()
    # distances of each channel from the value, in units of 1/85 of saturation x value / 255; the circle has 510 steps
    at = (2 * hue).remainder(510)
    steps = torch.stack([170 - (at - 255).abs(), (at - 170).abs() - 85, (at - 340).abs() - 85]).clamp(0, 85)
    return value - (value * saturation * steps / (85 * 255)).round()


def gaussian_blur(levels: Tensor, sigma: float) -> Tensor:
    """Gaussian blur along columns, then along rows, edge pixels repeated, rounded to whole levels."""
    radius = blur_radius(sigma)
    if radius == 0:
        return levels
    taps = [math.exp(-0.5 * (offset / sigma) ** 2) for offset in range(-radius, radius + 1)]
    weights = [tap / math.fsum(taps) for tap in taps]
    _, height, width = levels.shape
    padded = F.pad(levels.unsqueeze(0), (radius,) * 4, mode="replicate")[0]
    down, across = torch.zeros_like(padded[:, :height]), torch.zeros_like(levels)
    for step, weight in enumerate(weights):
        down += weight * padded[:, step : step + height]
    for step, weight in enumerate(weights):
        across += weight * down[:, :, step : step + width]
    return across.round()
