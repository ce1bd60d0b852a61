"""Random looks and images for ``ops.photometric``, and what Pillow and NumPy make of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pmm_fast import ops
from pmm_fast.data import transforms
from tests.tolerances import BLUR_TIES

ORDERS = list(itertools.permutations(range(4)))
NOTHING = (-1, -1, -1, -1, 1, 1, 1, 0, 0)
MEAN, STD = transforms.MEAN, transforms.STD


def random_images(count: int, size: tuple[int, int], seed: int = 0) -> Tensor:
    """uint8 ``[N, 3, h, w]``, contiguous: smooth in parts, with every level, greys and saturated colours."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (count, 3, *size))
    pixels = np.where(rng.random((count, 1, *size)) < 0.2, pixels[:, :1], pixels)
    pixels = np.where(rng.random(pixels.shape) < 0.1, rng.integers(0, 2, pixels.shape) * 255, pixels)
    return torch.from_numpy(pixels.astype(np.uint8))


def random_looks(orders: Sequence[Sequence[int]], sigmas: Sequence[float], seed: int = 0) -> Tensor:
    """float32 ``[N, 9]``: a look for each order, factors 0.2 to 1.8, the hue shifted by up to 76 steps."""
    rng = np.random.default_rng(seed)
    rows = [
        [*order, *rng.uniform(0.2, 1.8, 3), rng.integers(-76, 77), sigma]
        for order, sigma in zip(orders, itertools.cycle(sigmas), strict=False)
    ]
    return torch.tensor(rows, dtype=torch.float32)


def rendered(images: Tensor, looks: Tensor) -> Tensor:
    """The results of Pillow and NumPy, float32 ``[N, 3, h, w]``."""
    pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
    return torch.stack([transforms.render(image, look) for image, look in zip(pixels, looks.numpy(), strict=True)])


def photometric(images: Tensor, looks: Tensor) -> Tensor:
    """The operator, with the statistics of :mod:`pmm_fast.data.transforms`."""
    return ops.photometric(images, looks, MEAN, STD)


def levels_of(results: Tensor) -> Tensor:
    """The 8-bit levels that results were normalised from."""
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (MEAN, STD))
    return (results.double() * std + mean) * 255


def assert_rendered(found: Tensor, images: Tensor, looks: Tensor) -> None:
    """Bit-equal to Pillow where nothing is blurred; blurred, a rare level may be rounded the other way."""
    expected, found = rendered(images, looks), found.cpu()
    assert found.dtype == torch.float32 and found.shape == expected.shape and found.is_contiguous()
    sharp = looks[:, 8] == 0
    assert torch.equal(found[sharp], expected[sharp])
    if not sharp.all():
        distance = (levels_of(found[~sharp]) - levels_of(expected[~sharp])).abs()
        assert distance.max() < 1.01
        assert (distance > 0.01).sum() <= max(1, BLUR_TIES * distance.numel())
