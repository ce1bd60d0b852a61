"""Colour jitter, Gaussian blur and normalisation of 8-bit images in one step.

N images of h x w pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pmm_fast.ops import photometric_reference
from pmm_fast.ops.backends import dispatch, register, register_kernels
from pmm_fast.ops.chain import kernels
from pmm_fast.ops.checks import check_images, check_statistics
from pmm_fast.ops.looks import CONTRAST, MAX_RADIUS, ORDER, SIGMA, assert_looks, blur_radius, check_looks, read_looks

_NAME = "photometric"


def photometric(
    images: Tensor,  # [N, 3, h, w]
    looks: Tensor,  # [N, 9]
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    """Change the colours of each image, blur it and normalise it, as its look says.

    Every operation is Pillow's, rounding to 8 bits included; result = (level / 255 - mean) / std with the level of
    each pixel after the last one.  Formulas: docs/ops/photometric.md.

    Args:
        images: uint8 ``[N, 3, h, w]``, RGB; any strides are read in place (contiguous or channels last fastest).
        looks: float32 ``[N, 9]``, one row an image, on the CPU or with the images.  0..3: the operations in their
            order (0 brightness, 1 contrast, 2 saturation, 3 hue, each at most once; -1 none); 4..6: factors of
            brightness, contrast and saturation (1: unchanged); 7: shift of the hue in steps of 1/256 of the circle, a
            whole number; 8: sigma of the Gaussian blur in pixels (0: none), cut off at int(4 sigma + 0.5) <= 32 pixels.
        mean: of each channel, in 0..1.
        std: of each channel, positive.

    Returns:
        float32 ``[N, 3, h, w]``, contiguous, on the images' device.

    Raises:
        ValueError: wrong shape, dtype or device, or, where ``looks`` is on the CPU, a wrong value (row, value and what
            was expected are named).  Looks on a GPU are asserted there, since the host does not wait.

    Note:
        Not differentiable: images are integers.  Looks on the CPU do not make a GPU wait: they are copied from pinned
        memory.
    """
    check_images(_NAME, images)
    check_looks(_NAME, looks, images)
    check_statistics(_NAME, mean, std)
    return dispatch(_NAME, images, looks, tuple(mean), tuple(std))


@torch.library.custom_op("pmm_fast::photometric", mutates_args=())
def _forward(images: Tensor, looks: Tensor, mean: Sequence[float], std: Sequence[float], backend: str) -> Tensor:
    radius, contrast = MAX_RADIUS, True
    if looks.device.type == "cpu":
        rows = read_looks(_NAME, looks)
        radius = max((blur_radius(row[SIGMA]) for row in rows), default=0)
        contrast = any(CONTRAST in row[ORDER] for row in rows)
    if images.numel() == 0:
        return _empty(images)
    else:
        assert_looks(_NAME, looks)
    if looks.device != images.device:
        looks = looks.pin_memory().to(images.device, non_blocking=True)
    scale = [1 / (255 * value) for value in std]
    shift = [of_mean / of_std for of_mean, of_std in zip(mean, std, strict=True)]
    out = _empty(images)
    kernels(_NAME, backend).forward(images, looks.contiguous(), scale, shift, radius, contrast, out)
    return out


@_forward.register_fake
def _empty(images: Tensor, *others: object) -> Tensor:
    return torch.empty(images.shape, dtype=torch.float32, device=images.device)


register(_NAME, "reference", photometric_reference.photometric)
register_kernels(_NAME, _forward)
