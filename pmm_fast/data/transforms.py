"""Training augmentation of one image, and the normalisation shared with testing.

The law is that of the released code: isotropic scale, crop (with a border where the image is too small), mirror, colour
jitter, Gaussian blur, ImageNet normalisation.  The work is not: the crop window is drawn first and only its part of the
image is resampled, with the filter that a resize of the whole image would have used there.

Shapes: H x W image, h x w crop, w' x h' size the whole image would be scaled to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageEnhance

from pmm_fast.data.labels import IGNORE

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

JITTER = (0.4, 0.4, 0.4, 0.1)
STRONG_JITTER = (0.8, 0.8, 0.8, 0.3)
BLUR_SIGMA = (0.15, 1.3)
# the first eight numbers of a look that leaves colours as they are
NO_JITTER = (-1, -1, -1, -1, 1, 1, 1, 0)

# rows blurred at a time: their float32 copies stay in the second-level cache
_BLUR_ROWS = 32


@dataclass(frozen=True)
class Window:
    """Where a crop lies in the scaled image.

    Attributes:
        scaled: (w', h'), pixels.
        left, top: corner of the crop in the scaled image; negative where the crop begins in the border.
        size: (w, h) of the crop.
    """

    scaled: tuple[int, int]
    left: int
    top: int
    size: tuple[int, int]

    def visible(self) -> tuple[int, int, int, int]:
        """The part of the crop that shows the image: x0, y0, x1, y1 in the scaled image."""
        return (
            max(self.left, 0),
            max(self.top, 0),
            min(self.left + self.size[0], self.scaled[0]),
            min(self.top + self.size[1], self.scaled[1]),
        )


class Draw(NamedTuple):
    """Everything random about a sample but the choice of its image.

    Attributes:
        window: scale and crop.
        mirror: whether the crop is mirrored.
        look: float32 ``[9]``, colours and blur, see :meth:`Augment.draw`.
    """

    window: Window
    mirror: bool
    look: np.ndarray


class Augment:
    """The random training transform of one image, as a law to draw from; :func:`transform` carries it out.

    Colours, blur and normalisation (the look) come last, on uint8 crops of equal size, and so can be left to the
    training device (``ops.photometric``).

    Args:
        crop: height and width of the result, pixels.
        scale: range of the isotropic scale factor.
        flip: probability of a mirror image.
        jitter: probability of colour jitter (brightness, contrast, saturation 0.4, hue 0.1).
        blur: Gaussian blur, always, sigma uniform in [0.15, 1.3] pixels.

    Raises:
        ValueError: a value outside its range.
    """

    def __init__(self, crop: Sequence[int], scale: Sequence[float], flip: float, jitter: float, blur: bool) -> None:
        if len(crop) != 2 or min(crop) < 1:
            raise ValueError(f"crop: expected height and width of at least 1 pixel, got {list(crop)}")
        if len(scale) != 2 or not 0 < scale[0] <= scale[1]:
            raise ValueError(f"scale: expected two factors, 0 < lowest <= highest, got {list(scale)}")
        for name, value in (("flip", flip), ("jitter", jitter)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name}: expected a probability in [0, 1], got {value}")
        self.crop = (int(crop[0]), int(crop[1]))
        self.scale = (float(scale[0]), float(scale[1]))
        self.flip = flip
        self.jitter = jitter
        self.blur = blur

    def draw(self, size: tuple[int, int], rng: np.random.Generator, strong: bool = False) -> Draw:
        """Draw a transform.

        Random numbers are drawn in this order, always all of them, so that an option changes nothing but its own
        effect: scale, crop left, crop top, mirror, jitter or not, order of the four jitter operations, brightness,
        contrast, saturation, hue, blur sigma.

        Args:
            size: (W, H) of the image.
            rng: source of every random number.
            strong: colour jitter always, and stronger (0.8, 0.8, 0.8, 0.3); ``jitter`` has no effect.

        Returns:
            What was drawn.  The look holds the operations in their order (0 brightness, 1 contrast, 2 saturation, 3
            hue; -1: none), the factors of the first three, the shift of hue in steps of 1/256 of the circle, and sigma
            of the blur (0: none).
        """
        window = draw_window(size, self.crop, self.scale, rng)
        mirror = bool(rng.random() < self.flip)
        jitter = bool(rng.random() < self.jitter) or strong
        order = rng.permutation(4)
        strengths = STRONG_JITTER if strong else JITTER
        factors = [rng.uniform(max(0.0, 1 - s), 1 + s) for s in strengths[:3]]
        # int() and not floor: torchvision's conversion truncates towards zero
        shift = int(rng.uniform(-strengths[3], strengths[3]) * 255)
        sigma = rng.uniform(*BLUR_SIGMA)
        colours = [*order, *factors, shift] if jitter else NO_JITTER
        return Draw(window, mirror, np.array([*colours, sigma if self.blur else 0.0], np.float32))


def transform(image: Image.Image, labels: np.ndarray, draw: Draw) -> tuple[torch.Tensor, torch.Tensor]:
    """A drawn transform in Pillow and NumPy, from beginning to end: the reference of the loaders and of the look.

    Args:
        image: PIL, mode RGB, H x W.
        labels: uint8 ``[H, W]``.
        draw: from :meth:`Augment.draw`.

    Returns:
        The image, float32 ``[3, h, w]``, normalised, and the labels, uint8 ``[h, w]``.
    """
    pixels = np.asarray(crop_image(image, draw.window))
    if draw.mirror:
        pixels = pixels[:, ::-1].copy()
    return render(pixels, draw.look), torch.from_numpy(crop_labels(labels, draw.window, draw.mirror))


def render(pixels: np.ndarray, look: np.ndarray) -> torch.Tensor:
    """Colour jitter, blur and normalisation of a crop, in Pillow and NumPy: what ``ops.photometric`` must equal.

    Args:
        pixels: uint8 ``[h, w, 3]``.
        look: float32 ``[9]``, see :meth:`Augment.draw`.

    Returns:
        float32 ``[3, h, w]``, normalised.
    """
    order = [int(operation) for operation in look[:4] if operation >= 0]
    image = colour_jitter(Image.fromarray(pixels), look[4:8].tolist(), order)
    sigma = float(look[8])
    return _scale_to_imagenet(gaussian_blur(np.asarray(image), sigma)) if sigma else normalise(image)


def draw_window(
    size: tuple[int, int], crop: tuple[int, int], scale: tuple[float, float], rng: np.random.Generator
) -> Window:
    """Draw a scale and the place of the crop.

    The scaled image is ``int(W s) x int(H s)``.  A side shorter than the crop gets a border of
    ``(crop - side) // 2 + 1`` pixels at both ends; the crop is uniform over the image with its border.

    Args:
        size: (W, H) of the image.
        crop: (h, w).
        scale: range of the factor.
        rng: three numbers are drawn from it.
    """
    factor = rng.uniform(*scale)
    scaled = (max(1, int(size[0] * factor)), max(1, int(size[1] * factor)))
    corner = []
    for side, target in zip(scaled, (crop[1], crop[0]), strict=True):
        border = (target - side) // 2 + 1 if side < target else 0
        corner.append(int(rng.integers(0, side + 2 * border - target + 1)) - border)
    return Window(scaled, corner[0], corner[1], (crop[1], crop[0]))


def footprint(size: tuple[int, int], window: Window) -> tuple[int, int, int, int]:
    """The part of an image that a crop depends on, the reach of the filter included.

    Args:
        size: (W, H) of the image.
        window: where the crop lies.

    Returns:
        left, top, right, bottom, pixels of the image.
    """
    x0, y0, x1, y1 = window.visible()
    low, high = [], []
    for first, last, side, scaled in ((x0, x1, size[0], window.scaled[0]), (y0, y1, size[1], window.scaled[1])):
        step = side / scaled
        # the filter reaches two steps, of at least a pixel, to both sides
        reach = math.ceil(2 * max(step, 1.0)) + 1
        low.append(max(math.floor(first * step) - reach, 0))
        high.append(min(math.ceil(last * step) + reach, side))
    return low[0], low[1], high[0], high[1]


def crop_image(image: Image.Image, window: Window) -> Image.Image:
    """The crop of the bicubically resized image (antialiased where it shrinks), black outside the image.

    Equals resizing the whole image and cropping, but for one value in some 500 that rounds otherwise (by a grey level,
    at most two).
    """
    part = footprint(image.size, window)
    return resample(image.crop(part), image.size, part, window)


def resample(image: Image.Image, size: tuple[int, int], part: tuple[int, int, int, int], window: Window) -> Image.Image:
    """``crop_image`` of an image of which only a part is at hand.

    Pillow's ``box`` takes the same filter as a resize of the whole image, its support scaled alike, and sees the pixels
    around the box.  Columns come before rows, explicitly: between the two passes values are clipped to 0..255, so the
    order shows, and newer Pillow (seen in 13.0) chooses it by cost.

    Args:
        image: the part, PIL, mode RGB.
        size: (W, H) of the whole image.
        part: where the part lies; at least ``footprint``.
        window: where the crop lies.
    """
    x0, y0, x1, y1 = window.visible()
    across, down = size[0] / window.scaled[0], size[1] / window.scaled[1]
    # no further than the image: a rounding error beyond its edge would be refused
    left, right = x0 * across - part[0], min(x1 * across - part[0], image.width)
    top, bottom = y0 * down - part[1], min(y1 * down - part[1], image.height)
    bicubic = Image.Resampling.BICUBIC
    shown = image.resize((x1 - x0, image.height), bicubic, box=(left, 0, right, image.height))
    shown = shown.resize((x1 - x0, y1 - y0), bicubic, box=(0, top, shown.width, bottom))
    if shown.size == window.size:
        return shown
    canvas = Image.new("RGB", window.size)
    canvas.paste(shown, (x0 - window.left, y0 - window.top))
    return canvas


def crop_labels(labels: np.ndarray, window: Window, mirror: bool = False) -> np.ndarray:
    """The crop of the label map resized by nearest neighbour, 255 outside it; bit-equal to Pillow on the whole map.

    Args:
        labels: uint8 ``[H, W]``.
        window: where the crop lies.
        mirror: mirror the crop.

    Returns:
        uint8 ``[h, w]``, contiguous.
    """
    x0, y0, x1, y1 = window.visible()
    rows = _nearest(labels.shape[0], window.scaled[1])[y0:y1]
    columns = _nearest(labels.shape[1], window.scaled[0])[x0:x1]
    left = x0 - window.left
    if mirror:
        columns, left = columns[::-1], window.size[0] - left - len(columns)
    # rows first: whole rows are copied fast, and the second gather reads them in order
    part = labels[rows].take(columns, axis=1)
    if part.shape == (window.size[1], window.size[0]):
        return part
    canvas = np.full((window.size[1], window.size[0]), IGNORE, np.uint8)
    top = y0 - window.top
    canvas[top : top + part.shape[0], left : left + part.shape[1]] = part
    return canvas


def _nearest(source: int, target: int) -> np.ndarray:
    """The source index of each of ``target`` pixels, as Pillow finds it: by adding up the step, rounding included."""
    step = source / target
    positions = np.full(target, step)
    positions[0] = step * 0.5
    return np.minimum(np.cumsum(positions).astype(np.int64), source - 1)


def colour_jitter(image: Image.Image, factors: Sequence[float], order: Sequence[int] | np.ndarray) -> Image.Image:
    """Brightness, contrast, saturation and hue, as torchvision changes them on PIL images.

    Args:
        image: PIL, mode RGB.
        factors: of brightness, contrast, saturation (1: unchanged), and the shift of hue in 1/256 of the circle.
        order: of 0..3, those to apply, in their order.
    """
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for step in order:
        image = enhancers[step](image).enhance(factors[step]) if step < 3 else shift_hue(image, int(factors[3]))
    return image


def shift_hue(image: Image.Image, shift: int) -> Image.Image:
    """Turn the hue by ``shift`` of the 256 steps of the circle."""
    hue, saturation, value = image.convert("HSV").split()
    hue = hue.point([(level + shift) % 256 for level in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


def gaussian_blur(image: np.ndarray, sigma: float) -> torch.Tensor:
    """Gaussian blur, cut off at four sigma, edge pixels repeated beyond the border.

    Args:
        image: uint8 ``[H, W, 3]``.
        sigma: standard deviation, pixels.

    Returns:
        float32 ``[3, H, W]`` in 0..255, rounded to whole grey levels.
    """
    height, width, _ = image.shape
    radius = int(4 * sigma + 0.5)
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    weights = (taps / taps.sum()).tolist()
    padded = np.pad(image, ((radius, radius), (radius, radius), (0, 0)), mode="edge")
    # [rows, columns x channels]: a step down is a row, a step right is three places, and both sums run over long rows
    flat = torch.from_numpy(padded).view(height + 2 * radius, (width + 2 * radius) * 3)
    result = torch.empty(3, height, width)
    for top in range(0, height, _BLUR_ROWS):
        rows = min(_BLUR_ROWS, height - top)
        block = flat[top : top + rows + 2 * radius].float()
        down = block[:rows] * weights[0]
        for tap in range(1, 2 * radius + 1):
            down.add_(block[tap : tap + rows], alpha=weights[tap])
        across = down[:, : 3 * width] * weights[0]
        for tap in range(1, 2 * radius + 1):
            across.add_(down[:, 3 * tap : 3 * (tap + width)], alpha=weights[tap])
        result[:, top : top + rows] = across.view(rows, width, 3).permute(2, 0, 1)
    return result.round_()


def normalise(image: Image.Image) -> torch.Tensor:
    """An RGB image as the network wants it.

    Args:
        image: PIL, mode RGB, H x W.

    Returns:
        float32 ``[3, H, W]``: ``(value / 255 - MEAN) / STD``.

    Raises:
        ValueError: the image is not RGB.
    """
    if image.mode != "RGB":
        raise ValueError(f"image: expected mode RGB, got {image.mode}")
    # a copy: PIL's memory is read-only, which torch warns about
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return _scale_to_imagenet(pixels.to(torch.float32, memory_format=torch.contiguous_format))


def denormalise(tensor: torch.Tensor) -> np.ndarray:
    """The inverse of ``normalise``, rounded and clamped: float ``[3, H, W]`` to uint8 ``[H, W, 3]``."""
    mean, std = (torch.tensor(v, device=tensor.device).view(3, 1, 1) for v in (MEAN, STD))
    levels = ((tensor.detach().float() * std + mean) * 255).round().clamp(0, 255)
    return levels.to(torch.uint8).permute(1, 2, 0).contiguous().cpu().numpy()


def _scale_to_imagenet(levels: torch.Tensor) -> torch.Tensor:
    """Normalise float32 ``[3, H, W]`` in 0..255, in place."""
    for channel, mean, std in zip(levels, MEAN, STD, strict=True):
        channel.mul_(1 / (255 * std)).sub_(mean / std)
    return levels
