"""Loading a training sample as the released code does (PintheMemory ``0946a43``), written anew and plainly.

Labels are matched class by class over the whole map; the whole image and the whole label map are scaled before a crop
is cut out; colour jitter goes through Pillow, the blur is in double precision; labels leave as int64, twice.  A
baseline for ``bench/data_loading.py``; what is random is a ``Draw``, so that other ways can be given the same.

Shapes: H x W image, h x w crop.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from bench.loading_files import SYNTHIA_IDS
from pmm_fast.data.labels import IGNORE, get_space
from pmm_fast.data.transforms import BLUR_SIGMA, JITTER, MEAN, STD, colour_jitter

try:
    from scipy.ndimage import gaussian_filter
except ImportError:
    gaussian_filter = None

SCALE = (0.5, 2.0)
JITTER_SHARE = 0.5
FLIP_SHARE = 0.5
TRUNCATE = 4.0  # where the blur is cut off, in sigmas


@dataclass(frozen=True)
class Draw:
    """Everything random about a sample.

    Attributes:
        scaled: (w, h) that the whole image is scaled to.
        corner: (left, top) of the crop in the scaled image with its border.
        mirror: whether to mirror.
        jitter: whether to jitter.
        order: of brightness, contrast, saturation, hue (0..3).
        factors: of brightness, contrast, saturation; the shift of the hue, as a part of the circle.
        sigma: of the blur, pixels.
    """

    scaled: tuple[int, int]
    corner: tuple[int, int]
    mirror: bool
    jitter: bool
    order: tuple[int, ...]
    factors: tuple[float, ...]
    sigma: float


def draw(size: tuple[int, int], crop: tuple[int, int], rng: np.random.Generator) -> Draw:
    """Draw a sample's randomness; the numbers are taken in the order in which pmm_fast takes them.

    Args:
        size: (W, H) of the image.
        crop: (h, w).
        rng: where they are taken from.
    """
    factor = rng.uniform(*SCALE)
    scaled = int(size[0] * factor), int(size[1] * factor)
    left, top = (
        int(rng.integers(0, side + 2 * border_of(side, target) - target + 1))
        for side, target in zip(scaled, crop[::-1], strict=True)
    )
    mirror, jitter = bool(rng.random() < FLIP_SHARE), bool(rng.random() < JITTER_SHARE)
    order = tuple(int(step) for step in rng.permutation(4))
    factors = [rng.uniform(1 - strength, 1 + strength) for strength in JITTER[:3]]
    factors.append(rng.uniform(-JITTER[3], JITTER[3]))
    return Draw(scaled, (left, top), mirror, jitter, order, tuple(factors), rng.uniform(*BLUR_SIGMA))


def border_of(side: int, target: int) -> int:
    """Pixels that are added at both ends of a side which is too short for the crop."""
    return (target - side) // 2 + 1 if side < target else 0


# --- the steps ----------------------------------------------------------------------------------------------------


def read_image(path: Path) -> Image.Image:
    """Decode an image."""
    return Image.open(path).convert("RGB")


def read_colours(path: Path) -> NDArray[np.uint8]:
    """GTAV: three comparisons of the whole three-channel map for every class."""
    pixels = np.array(Image.open(path).convert("RGB"))
    labels = np.full(pixels.shape[:2], IGNORE, np.uint8)
    for index, colour in enumerate(get_space("cityscapes19").colours):
        red, green, blue = ((pixels == np.array(colour))[:, :, channel] for channel in range(3))
        labels[red & green & blue] = index
    return labels


def read_deep(path: Path) -> NDArray[np.uint8]:
    """SYNTHIA: the first of three 16-bit channels, compared with each of the 23 ids."""
    image = Image.open(path)
    # Pillow takes the first byte of each 16-bit number for an 8-bit one, which is the high byte of a PNG; told that the
    # numbers are little-endian it takes the low byte, and no id has a high one
    image.tile = [tile._replace(args="RGB;16L") for tile in image.tile]
    ids = np.array(image)[:, :, 0].astype(np.uint16)
    labels = ids.copy()
    targets = {source: target for target, source in enumerate(SYNTHIA_IDS)}
    for source in range(23):
        labels[ids == source] = targets.get(source, IGNORE)
    return labels.astype(np.uint8)


def read_ids(path: Path) -> NDArray[np.uint8]:
    """One channel of ids, each of which is looked for in turn."""
    ids = np.array(Image.open(path))
    labels = ids.copy()
    for index in (*range(get_space("cityscapes19").num_classes), IGNORE):
        labels[ids == index] = index
    return labels


READERS: dict[str, Callable[[Path], NDArray[np.uint8]]] = {
    "gtav": read_colours,
    "synthia": read_deep,
    "jpeg": read_ids,
}


def scale_and_crop(image: Image.Image, drawn: Draw, crop: tuple[int, int]) -> Image.Image:
    """Scale the whole, add a border where that is too small, cut out the crop, mirror.

    Images (mode RGB) are scaled with the bicubic filter and bordered with black, labels (mode L) take the nearest value
    and are bordered with 255.
    """
    if image.mode == "RGB":
        # columns, then rows, as Pillow did when the released code was written; newer ones choose, at the same cost
        for size in ((drawn.scaled[0], image.height), drawn.scaled):
            image = image.resize(size, Image.Resampling.BICUBIC)
    else:
        image = image.resize(drawn.scaled, Image.Resampling.NEAREST)
    right, down = (border_of(side, target) for side, target in zip(drawn.scaled, crop[::-1], strict=True))
    if right or down:
        fill = (0, 0, 0) if image.mode == "RGB" else IGNORE
        image = ImageOps.expand(image, border=(right, down, right, down), fill=fill)
    left, top = drawn.corner
    image = image.crop((left, top, left + crop[1], top + crop[0]))
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if drawn.mirror else image


def jitter(image: Image.Image, drawn: Draw) -> Image.Image:
    """Brightness, contrast, saturation and hue with Pillow."""
    *factors, shift = drawn.factors
    return colour_jitter(image, [*factors, int(shift * 255)], drawn.order)


def blur(image: Image.Image, sigma: float) -> Image.Image:
    """Gaussian blur in double precision, cut to whole levels."""
    levels = np.array(image) / 255.0
    if gaussian_filter is not None:
        blurred = gaussian_filter(levels, (sigma, sigma, 0), mode="nearest", truncate=TRUNCATE)
    else:
        blurred = plain_filter(levels, sigma)
    return Image.fromarray((blurred * 255).astype(np.uint8))


def plain_filter(levels: NDArray[np.float64], sigma: float) -> NDArray[np.float64]:
    """What SciPy's ``gaussian_filter`` computes, where there is no SciPy."""
    radius = int(TRUNCATE * sigma + 0.5)
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    for axis in (0, 1):
        pads = [(radius, radius) if axis == other else (0, 0) for other in range(3)]
        padded = np.pad(levels, pads, mode="edge")
        length = levels.shape[axis]
        levels = sum(
            weight * padded.take(range(shift, shift + length), axis)
            for shift, weight in enumerate((taps / taps.sum()).tolist())
        )
    return levels


def normalise(image: Image.Image) -> Tensor:
    """To float32 ``[3, h, w]`` in 0..1, less the mean, over the deviation."""
    values = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (MEAN, STD))
    return values.sub_(mean).div_(std)


def finish(image: Image.Image, drawn: Draw) -> Tensor:
    """What follows the crop: jitter, blur, normalisation."""
    if drawn.jitter:
        image = jitter(image, drawn)
    return normalise(blur(image, drawn.sigma))


def load(
    kind: str, pair: tuple[Path, Path], crop: tuple[int, int], rng: np.random.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """One sample.

    Args:
        kind: of the files: ``gtav``, ``synthia``, ``jpeg``.
        pair: image and label file.
        crop: (h, w).
        rng: what is random.

    Returns:
        The image, float32 ``[3, h, w]``, and twice its labels, int64 ``[h, w]``.
    """
    image, labels = read_image(pair[0]), Image.fromarray(READERS[kind](pair[1]))
    drawn = draw(image.size, crop, rng)
    image, labels = (scale_and_crop(one, drawn, crop) for one in (image, labels))
    target = torch.from_numpy(np.array(labels, np.int32)).long()
    return finish(image, drawn), target, target.clone()
