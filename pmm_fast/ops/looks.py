"""Looks: what changes the colours and the sharpness of an image, nine numbers an image (docs/ops/photometric.md)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# what stands where: operations in their order, factors of the first three, shift of the hue, sigma of the blur
ORDER, FACTORS, SHIFT, SIGMA = slice(0, 4), slice(4, 7), 7, 8
LENGTH = 9
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
NONE = -1
MAX_RADIUS = 32


def blur_radius(sigma: float) -> int:
    """Pixels to each side that a blur reads."""
    return int(4 * sigma + 0.5)


def check_looks(operator: str, looks: Tensor, images: Tensor) -> None:
    """A look for each image, on the CPU or with the images."""
    expected = (len(images), LENGTH)
    if tuple(looks.shape) != expected:
        raise ValueError(f"{operator}: looks must be [N, {LENGTH}] = {expected}, got shape {tuple(looks.shape)}")
    if looks.dtype != torch.float32:
        raise ValueError(f"{operator}: looks must be float32, got {looks.dtype}")
    if looks.device.type != "cpu" and looks.device != images.device:
        raise ValueError(f"{operator}: looks must be on the CPU or on {images.device}, got {looks.device}")


def read_looks(operator: str, looks: Tensor) -> list[list[float]]:
    """The looks as numbers, checked; waits for a GPU that they are on.

    Raises:
        ValueError: a value that no look has, with its row.
    """
    rows: list[list[float]] = looks.tolist()
    for index, row in enumerate(rows):
        wrong = _wrong(row)
        if wrong:
            raise ValueError(f"{operator}: looks[{index}]: {wrong}")
    return rows


def assert_looks(operator: str, looks: Tensor) -> None:
    """:func:`read_looks`'s check of looks on a GPU, as an assertion there, which the host does not await."""
    order, shift, sigma = looks[:, ORDER], looks[:, SHIFT], looks[:, SIGMA].double()
    named = order != NONE
    repeated = ((order[:, :, None] == order[:, None, :]) & named[:, :, None]).sum() != named.sum()
    known = (order >= NONE) & (order <= HUE) & (order == order.floor())
    right = looks.isfinite().all() & known.all() & ~repeated & (shift == shift.floor()).all()
    right &= ((sigma >= 0) & (4 * sigma + 0.5 < MAX_RADIUS + 1)).all()
    torch._assert_async(right, f"{operator}: looks hold a value that no look has")


def _wrong(row: Sequence[float]) -> str | None:
    """What is wrong with a look, or None."""
    order, sigma, shift = row[ORDER], row[SIGMA], row[SHIFT]
    if not all(map(math.isfinite, row)):
        return f"expected finite numbers, got {row}"
    if not all(code in (NONE, BRIGHTNESS, CONTRAST, SATURATION, HUE) for code in order):
        return f"expected operations 0..3 or -1 (none) in columns 0..3, got {order}"
    named = [code for code in order if code != NONE]
    if len(set(named)) != len(named):
        return f"expected each operation at most once in columns 0..3, got {order}"
    if shift != int(shift):
        return f"expected a whole number as the shift of the hue (column {SHIFT}), got {shift}"
    if sigma < 0 or blur_radius(sigma) > MAX_RADIUS:
        return f"expected sigma 0 or positive, with int(4 sigma + 0.5) <= {MAX_RADIUS} (column {SIGMA}), got {sigma}"
    return None
