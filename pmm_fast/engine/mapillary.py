"""What Mapillary Vistas is tested as: its images come in all sizes and shapes, and the field has several answers."""

from __future__ import annotations

import numpy as np
from PIL import Image

from pmm_fast.config.schema import MapillaryTest

SIDE = 1536
_IGNORE, _ROAD = 255, 0


def mapillary_view(image: Image.Image, labels: np.ndarray, variant: MapillaryTest) -> tuple[Image.Image, np.ndarray]:
    """An image and its labels as a variant tests them; images are resized bicubically, labels by nearest neighbour.

    * ``native``: as they are.
    * ``half``: both at half the width and height, rounded down.
    * ``centred``: both at height 1536 and width ``int(w / h * 1536)``, then the middle 1536 columns; narrower images
      get black columns, which are not counted (255), on both sides.
    * ``released``: the same, but the black columns count as road (0), and the image stands ``1536 - w`` columns further
      right, so that as many are cut off in part (released ``joint_transforms.py:144-207``: fill 0, and an offset from
      the width before padding).

    Args:
        image: RGB.
        labels: uint8 ``[H, W]``, of the image's size.
        variant: one of these.

    Returns:
        Image and labels of one size.
    """
    if variant == "native":
        return image, labels
    width, height = image.size
    truth = Image.fromarray(labels)
    if variant == "half":
        return _resize(image, truth, (max(1, width // 2), max(1, height // 2)))
    width = int(width / height * SIDE)
    image, labels = _resize(image, truth, (max(1, width), SIDE))
    # Python rounds halves to even, and so does the released code
    left = -round((image.width - SIDE) / 2)
    if variant == "released":
        left += max(0, SIDE - image.width)
    canvas = Image.new("RGB", (SIDE, SIDE))
    canvas.paste(image, (left, 0))
    truth = Image.new("L", (SIDE, SIDE), _ROAD if variant == "released" else _IGNORE)
    truth.paste(Image.fromarray(labels), (left, 0))
    return canvas, np.array(truth)


def _resize(image: Image.Image, truth: Image.Image, size: tuple[int, int]) -> tuple[Image.Image, np.ndarray]:
    return image.resize(size, Image.Resampling.BICUBIC), np.array(truth.resize(size, Image.Resampling.NEAREST))
