"""The crop of a resized image from the part of the image that it depends on, in C++ where that was compiled."""

from __future__ import annotations

import numpy as np
from PIL import Image

from pmm_fast.data.transforms import Draw, Window, footprint, resample
from pmm_fast.ops import extension


def crop_backend() -> str:
    """What ``resized_crop`` runs on: ``C++``, or ``Pillow`` where no module was compiled."""
    return "Pillow" if extension.missing("_C") else "C++"


def crop_drawn(image: Image.Image, draw: Draw) -> np.ndarray:
    """The crop of a drawn transform, mirrored if it says so.

    Args:
        image: PIL, mode RGB.
        draw: from ``Augment.draw``.

    Returns:
        uint8 ``[h, w, 3]``.
    """
    box = footprint(image.size, draw.window)
    out = np.empty((*draw.window.size[::-1], 3), np.uint8)
    resized_crop(np.asarray(image.crop(box)), image.size, box, draw.window, draw.mirror, out)
    return out


def resized_crop(
    part: np.ndarray,
    size: tuple[int, int],
    box: tuple[int, int, int, int],
    window: Window,
    mirror: bool,
    out: np.ndarray,
) -> None:
    """Crop an image as if it had been resized as a whole, bicubically, antialiased where it shrinks.

    The C++ kernel gives the very levels of Pillow's resize of the whole image, columns first; Pillow on a part rounds
    one value in some 500 otherwise (``transforms.resample``).

    Args:
        part: uint8 ``[h', w', 3]``, C-contiguous, what is at hand of the image: at least ``transforms.footprint``.
        size: (W, H) of the whole image.
        box: left, top, right, bottom of the part in the image.
        window: where the crop lies; black where that is outside the image.
        mirror: mirror the crop.
        out: uint8 ``[h, w, 3]``, C-contiguous, receives the crop.

    Raises:
        ValueError: an array of another type, shape or layout, or a part that is too small.
    """
    needed = footprint(size, window)
    if not (0 <= box[0] <= needed[0] and 0 <= box[1] <= needed[1] and needed[2] <= box[2] and needed[3] <= box[3]):
        raise ValueError(f"part: expected at least {needed} of the image (left, top, right, bottom), got {box}")
    if box[2] > size[0] or box[3] > size[1]:
        raise ValueError(f"part: expected to lie in the image of {size[0]}x{size[1]}, got {box}")
    height, width = box[3] - box[1], box[2] - box[0]
    for name, array, shape in (("part", part, (height, width, 3)), ("out", out, (*window.size[::-1], 3))):
        if array.dtype != np.uint8 or array.shape != shape or not array.flags.c_contiguous:
            raise ValueError(f"{name}: expected contiguous uint8 {list(shape)}, got {array.dtype} {list(array.shape)}")
    if not out.flags.writeable:
        raise ValueError("out: expected an array that can be written to")
    if crop_backend() == "Pillow":
        pixels = np.asarray(resample(Image.fromarray(part), size, box, window))
        out[:] = pixels[:, ::-1] if mirror else pixels
        return
    extension.load("_C").resized_crop(
        part=part.ctypes.data,
        part_stride=part.strides[0],
        part_left=box[0],
        part_top=box[1],
        part_width=width,
        part_height=height,
        image_width=size[0],
        image_height=size[1],
        scaled_width=window.scaled[0],
        scaled_height=window.scaled[1],
        left=window.left,
        top=window.top,
        width=window.size[0],
        height=window.size[1],
        mirror=mirror,
        out=out.ctypes.data,
    )
