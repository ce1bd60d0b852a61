"""Memory activation maps: where in an image the slot of a class is read.

Shapes: K classes (slots), h x w feature positions, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from pmm_fast.data.contact_sheet import title_font
from pmm_fast.data.labels import LabelSpace
from pmm_fast.viz.overlays import BACKGROUND, GAP, INK, shorten

RELEASED_CLASSES = ("building", "vegetation", "sky", "car", "sidewalk", "pole")
"""What the released code draws (``ablation.py``, without ``--all_class``)."""

OPACITY = 0.65

# viridis of matplotlib (CC0) at 17 even steps; between them it is straight to within 6 of 255 levels
_VIRIDIS = np.array(
    [
        *((68, 1, 84), (72, 24, 106), (71, 45, 123), (66, 64, 134), (59, 82, 139), (51, 99, 141), (44, 114, 142)),
        *((38, 130, 142), (33, 145, 140), (31, 160, 136), (40, 174, 128), (63, 188, 115), (94, 201, 98)),
        *((132, 212, 75), (173, 220, 48), (216, 226, 25), (253, 231, 37)),
    ],
    np.float32,
)


def default_classes(space: LabelSpace) -> list[int]:
    """Ids of the ``RELEASED_CLASSES``, in that order, as far as a space has them; below half of them, its first six."""
    known = [space.classes.index(name) for name in RELEASED_CLASSES if name in space.classes]
    if 2 * len(known) < len(RELEASED_CLASSES):
        return list(range(min(len(RELEASED_CLASSES), space.num_classes)))
    return known


def activation(assignment: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Weights of a read, upsampled, then stretched over the slots at every pixel: 0 the least read one, 1 the most.

    ``a[k] = (w[k] - min_j w[j]) / (max_j w[j] - min_j w[j])``, w bilinear with corners aligned, as the released code
    has it.  So a map tells how a slot ranks among the others at a pixel, not how large its weight is.

    Args:
        assignment: weights of the slots, floating point ``[K, h, w]``.
        size: H, W.

    Returns:
        float32 ``[K, H, W]``, 0 where all slots weigh the same.

    Raises:
        ValueError: not floating point ``[K, h, w]``, or not finite.
    """
    if assignment.ndim != 3 or not np.issubdtype(assignment.dtype, np.floating) or not assignment.size:
        raise ValueError(
            f"assignment: expected floating point [K, h, w], got {assignment.dtype} {list(assignment.shape)}"
        )
    if not np.isfinite(assignment).all():
        raise ValueError("assignment: expected finite weights, got NaN or infinity")
    weights = _stretch(_stretch(assignment.astype(np.float32), 1, size[0]), 2, size[1])
    low = weights.min(0)
    span = weights.max(0) - low
    return np.divide(weights - low, span, out=np.zeros_like(weights), where=span > 0)


def _stretch(values: np.ndarray, axis: int, length: int) -> np.ndarray:
    """Linear interpolation of one axis to a length, first and last value kept."""
    last = values.shape[axis] - 1
    positions = np.linspace(0, last, length, dtype=np.float32)
    below = np.minimum(positions.astype(np.int64), max(last - 1, 0))
    shape = [1] * values.ndim
    shape[axis] = length
    part = (positions - below).astype(np.float32).reshape(shape)
    return values.take(below, axis) * (1 - part) + values.take(np.minimum(below + 1, last), axis) * part


def viridis(values: np.ndarray) -> np.ndarray:
    """A perceptually even colour map that colour-blind readers can read.

    Args:
        values: any shape, 0 (dark violet) to 1 (yellow); clipped.

    Returns:
        uint8 RGB, the shape with 3 appended.
    """
    steps = np.linspace(0, 1, len(_VIRIDIS))
    channels = [np.interp(values, steps, _VIRIDIS[:, channel]) for channel in range(3)]
    return np.stack(channels, -1).round().astype(np.uint8)


def activation_grid(
    image: Image.Image,
    assignment: np.ndarray,
    space: LabelSpace,
    classes: Sequence[int] | None = None,
    columns: int = 4,
    cell_width: int = 300,
) -> Image.Image:
    """The image, and a panel a class: its ``activation`` in viridis, painted over the image with opacity 0.65.

    Args:
        image: RGB.
        assignment: weights of the slots, floating point ``[K, h, w]``, K classes of ``space``.
        space: names of the classes.
        classes: ids to draw, in order; None: ``default_classes``.
        columns: panels in a row.
        cell_width: width of a panel in pixels; maps are upsampled to it.

    Returns:
        RGB image, a colour bar below.

    Raises:
        ValueError: another number of slots than classes, or an id that is no class.
    """
    if len(assignment) != space.num_classes:
        raise ValueError(f"activation_grid: expected {space.num_classes} slots ({space.name}), got {len(assignment)}")
    chosen = default_classes(space) if classes is None else list(classes)
    for index in chosen:
        if not 0 <= index < space.num_classes:
            raise ValueError(f"activation_grid: classes: expected 0..{space.num_classes - 1}, got {index}")
    height = max(1, round(cell_width * image.height / image.width))
    small = image.convert("RGB").resize((cell_width, height), Image.Resampling.LANCZOS)
    maps = activation(assignment, (height, cell_width))
    panels = [("image", small)]
    panels += [(space.classes[k], Image.blend(small, Image.fromarray(viridis(maps[k])), OPACITY)) for k in chosen]
    columns = min(columns, len(panels))
    font = title_font(15)
    line, rows = 26, -(-len(panels) // columns)
    grid = Image.new("RGB", (GAP + columns * (cell_width + GAP), rows * (line + height + GAP) + line + GAP), BACKGROUND)
    draw = ImageDraw.Draw(grid)
    for position, (title, panel) in enumerate(panels):
        left = GAP + position % columns * (cell_width + GAP)
        top = position // columns * (line + height + GAP)
        draw.text((left + cell_width / 2, top + line / 2), shorten(title, font, cell_width), INK, font, anchor="mm")
        grid.paste(panel, (left, top + line))
    grid.paste(_colour_bar(grid.width - 2 * GAP, line), (GAP, grid.height - line - GAP // 2))
    return grid


def _colour_bar(width: int, height: int) -> Image.Image:
    """Viridis from left to right with a word at each end, as much of it as the width has room for."""
    strip, font = Image.new("RGB", (width, height), BACKGROUND), title_font(14)
    draw = ImageDraw.Draw(strip)
    words = ("least read slot at the pixel", "most read slot")
    draw.text((0, height / 2), words[0], INK, font, anchor="lm")
    left, length = round(font.getlength(words[0])) + GAP, 160
    ramp = Image.fromarray(viridis(np.tile(np.linspace(0, 1, length), (height - 12, 1))))
    strip.paste(ramp, (left, 6))
    draw.text((left + length + GAP, height / 2), words[1], INK, font, anchor="lm")
    return strip
