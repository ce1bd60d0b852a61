"""Square matrices over classes: confusion of a test, and similarity of a memory's slots.

K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw

from pmm_fast.data.contact_sheet import title_font
from pmm_fast.viz.overlays import BACKGROUND, FAINT, GAP, INK, shorten, upright

# lightness falls evenly on both sides of zero, so that the order survives in grey and for colour-blind readers
_STOPS = (-1.0, -0.5, 0.0, 0.25, 0.5, 0.75, 1.0)
_COLOURS = np.array(
    [(127, 59, 8), (224, 146, 72), (255, 255, 255), (198, 220, 239), (122, 178, 217), (40, 116, 180), (8, 48, 107)],
    np.float32,
)
_NOTHING = (232, 232, 230)
_TEXT, _SMALL = 14, 12
_SIDE, _SMALLEST_CELL, _LARGEST_CELL = 720, 16, 64
_LABEL_WIDTH = 150
_BAR, _BAR_LENGTH, _RIGHT = 16, 140, 120
# a matrix of few classes leaves room for the colour bar
_NARROWEST = 240
# sum of the channels below which white is the better ink
_DARK = 400


def draw_confusion(matrix: np.ndarray, classes: Sequence[str], title: str = "") -> Image.Image:
    """A confusion matrix: what the pixels of each true class were taken for.

    ``share[i, j] = matrix[i, j] / sum_j matrix[i, j]``, in percent; a class without truth has a grey row.

    Args:
        matrix: pixels, integer ``[K, K]``, rows the truth, columns the prediction.
        classes: K names.
        title: above the matrix.

    Returns:
        RGB image.

    Raises:
        ValueError: not an integer ``[K, K]`` with as many classes, or a negative number.
    """
    count = len(classes)
    if not count or matrix.shape != (count, count) or not np.issubdtype(matrix.dtype, np.integer):
        raise ValueError(
            f"draw_confusion: expected integers [{count}, {count}], a row a class, "
            f"got {matrix.dtype} {list(matrix.shape)}"
        )
    if matrix.min() < 0:
        raise ValueError(f"draw_confusion: expected numbers of pixels, got {matrix.min()}")
    truth = matrix.sum(1, keepdims=True)
    shares = np.divide(matrix, truth, out=np.full(matrix.shape, np.nan), where=truth > 0)
    axes = ("truth", "prediction, % of the pixels of the true class")
    return _draw(shares, classes, title, axes, absent="no truth", write=lambda share: f"{100 * share:.0f}")


def draw_similarity(memory: np.ndarray, classes: Sequence[str], title: str = "") -> Image.Image:
    """Cosines between the slots of a memory.

    ``c[i, j] = m_i m_j / (|m_i| |m_j|)``; slots that are zero, of classes never seen, are grey.

    Args:
        memory: the slots, floating point ``[K, C]``.
        classes: K names.
        title: above the matrix.

    Returns:
        RGB image.

    Raises:
        ValueError: not a floating point ``[K, C]`` with as many classes, or not finite.
    """
    if memory.ndim != 2 or len(memory) != len(classes) or not np.issubdtype(memory.dtype, np.floating):
        raise ValueError(
            f"draw_similarity: expected floating point [{len(classes)}, C], got {memory.dtype} {list(memory.shape)}"
        )
    if not np.isfinite(memory).all():
        raise ValueError("draw_similarity: expected finite slots, got NaN or infinity")
    slots = memory.astype(np.float64)
    norms = np.linalg.norm(slots, axis=1, keepdims=True)
    units = np.divide(slots, norms, out=np.full(slots.shape, np.nan), where=norms > 0)
    cosines = units @ units.T
    return _draw(cosines, classes, title, ("slot", "cosine to slot"), absent="empty slot", write=_cosine)


def _cosine(value: float) -> str:
    """Two decimals without the zero before the point: ``.07``, ``-.31``, ``1``."""
    return f"{value:.2f}".replace("0.", ".") if 0.005 <= abs(value) < 0.995 else str(round(value))


def _colour(values: np.ndarray) -> np.ndarray:
    """Values in -1..1, clipped, to uint8 RGB: white at 0, blue above, brown below; NaN is grey."""
    channels = [np.interp(values, _STOPS, _COLOURS[:, channel]) for channel in range(3)]
    colours = np.where(np.isnan(values)[..., None], _NOTHING, np.stack(channels, -1))
    return colours.round().astype(np.uint8)


def _draw(
    values: np.ndarray,
    classes: Sequence[str],
    title: str,
    axes: tuple[str, str],
    absent: str,
    write: Callable[[float], str],
) -> Image.Image:
    """The matrix with class names, numbers where they fit, and a colour bar.

    Args:
        values: ``[K, K]`` in -1..1, NaN: grey.
        classes: K names.
        title: above the matrix.
        axes: what rows and columns are.
        absent: what grey means.
        write: a value as text.
    """
    font, small = title_font(_TEXT), title_font(_SMALL)
    cell = int(np.clip(_SIDE // len(classes), _SMALLEST_CELL, _LARGEST_CELL))
    side = cell * len(classes)
    names = [shorten(name, font, _LABEL_WIDTH) for name in classes]
    label = math.ceil(max(font.getlength(name) for name in names))
    line = round(1.6 * _TEXT)
    # upright axis title, names and matrix from the left; title, matrix, names and axis title from above
    left, top = line + label + 2 * GAP, GAP + (line + GAP if title else 0)
    width, bottom = max(side, _NARROWEST), top + side + label + 2 * GAP
    picture = Image.new("RGB", (left + width + _RIGHT, max(bottom + line + GAP, top + _NARROWEST)), BACKGROUND)
    draw = ImageDraw.Draw(picture)
    draw.text((left, GAP + line / 2), shorten(title, font, width + _RIGHT - GAP), INK, font, anchor="lm")
    _draw_cells(draw, values, (left, top), cell, write)
    for position, name in enumerate(names):
        middle = position * cell + cell // 2
        # a class that is not in the truth can still be predicted
        row, column = (FAINT if np.isnan(line).all() else INK for line in (values[position], values[:, position]))
        draw.text((left - GAP, top + middle), name, row, font, anchor="rm")
        tag = upright(name, font, math.ceil(font.getlength(name)), column)
        picture.paste(tag, (left + middle - tag.width // 2, top + side + GAP))
    picture.paste(upright(axes[0], small, side), (GAP // 2, top))
    draw.text((left, bottom + line / 2), axes[1], FAINT, small, anchor="lm")
    _draw_bar(picture, (left + side + 2 * GAP, top), -1.0 if np.nanmin(values, initial=0.0) < 0 else 0.0, write)
    if np.isnan(values).any():
        _draw_swatch(draw, (left + side + 2 * GAP, top + _BAR_LENGTH + 3 * GAP), absent)
    return picture


def _draw_cells(
    draw: ImageDraw.ImageDraw, values: np.ndarray, corner: tuple[int, int], cell: int, write: Callable[[float], str]
) -> None:
    font, colours = title_font(_SMALL), _colour(values)
    for row, column in np.ndindex(values.shape):
        x, y = corner[0] + column * cell, corner[1] + row * cell
        red, green, blue = (int(channel) for channel in colours[row, column])
        draw.rectangle((x, y, x + cell - 2, y + cell - 2), fill=(red, green, blue))
        if np.isnan(values[row, column]):
            continue
        text = write(float(values[row, column]))
        # zeros would hide the others
        if text != "0" and font.getlength(text) <= cell - 3:
            ink = INK if red + green + blue > _DARK else BACKGROUND
            draw.text((x + (cell - 1) / 2, y + (cell - 1) / 2), text, ink, font, anchor="mm")
    last = (corner[0] + cell * values.shape[1] - 1, corner[1] + cell * values.shape[0] - 1)
    draw.rectangle((corner[0] - 1, corner[1] - 1, *last), outline=FAINT)


def _draw_bar(picture: Image.Image, corner: tuple[int, int], low: float, write: Callable[[float], str]) -> None:
    """The colours from 1 down to ``low``, with the values beside them."""
    draw, font = ImageDraw.Draw(picture), title_font(_SMALL)
    ramp = _colour(np.linspace(1, low, _BAR_LENGTH))[:, None].repeat(_BAR, 1)
    picture.paste(Image.fromarray(ramp), corner)
    x, y = corner
    draw.rectangle((x - 1, y - 1, x + _BAR, y + _BAR_LENGTH), outline=FAINT)
    for value in (1.0, (1 + low) / 2, low):
        # the outermost numbers stay within the height of the bar
        middle = y + 5 + (_BAR_LENGTH - 10) * (1 - value) / (1 - low)
        draw.text((x + _BAR + GAP, middle), write(value), INK, font, anchor="lm")


def _draw_swatch(draw: ImageDraw.ImageDraw, corner: tuple[int, int], text: str) -> None:
    x, y = corner
    draw.rectangle((x - 1, y - 1, x + _BAR, y + _BAR), fill=_NOTHING, outline=FAINT)
    draw.text((x + _BAR + GAP, y + _BAR / 2), text, INK, title_font(_SMALL), anchor="lm")
