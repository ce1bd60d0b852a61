"""Label maps painted over images, and grids that compare them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pmm_fast.data.contact_sheet import title_font
from pmm_fast.data.labels import LabelSpace, colourise

BACKGROUND = (255, 255, 255)
INK = (32, 32, 32)
FAINT = (110, 110, 110)
GAP = 8


def overlay(image: Image.Image, labels: np.ndarray, space: LabelSpace, alpha: float = 0.55) -> Image.Image:
    """Paint labels over an image.

    Args:
        image: RGB; resized to the labels' size if it differs.
        labels: uint8 ``[H, W]``; ids that the space does not have, and 255, leave the image as it is, greyed a little.
        space: classes and colours.
        alpha: opacity of the colours, 0..1.

    Returns:
        RGB image of the labels' size.

    Raises:
        ValueError: ``alpha`` is not in 0..1, or ``labels`` is not uint8 ``[H, W]``.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha: expected 0..1, got {alpha}")
    colours = colourise(labels, space).astype(np.float32)
    height, width = labels.shape
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    pixels = np.asarray(image.convert("RGB"), np.float32)
    painted = (1 - alpha) * pixels + alpha * colours
    grey = 0.6 * pixels.mean(2, keepdims=True) + 0.4 * pixels
    known = (labels < space.num_classes)[..., None]
    return Image.fromarray(np.where(known, painted, grey).round().astype(np.uint8))


def legend(space: LabelSpace, width: int, size: int = 15) -> Image.Image:
    """A strip of colour swatches with class names, wrapped to a width.

    Args:
        space: classes and colours.
        width: of the strip, in pixels.
        size: of the text, in pixels.

    Returns:
        RGB image of that width.
    """
    font, swatch = title_font(size), round(1.1 * size)
    column = swatch + size // 2 + 2 * size + math.ceil(max(_text_width(name, font) for name in space.classes))
    columns = max(1, min(len(space.classes), width // column))
    rows = -(-len(space.classes) // columns)
    line = round(1.7 * size)
    strip = Image.new("RGB", (width, rows * line + GAP), BACKGROUND)
    draw = ImageDraw.Draw(strip)
    for position, (name, colour) in enumerate(zip(space.classes, space.colours, strict=True)):
        left, top = position % columns * (width // columns), position // columns * line + GAP // 2
        draw.rectangle((left, top, left + swatch, top + swatch), fill=colour, outline=INK)
        draw.text((left + swatch + size // 2, top + swatch / 2), name, INK, font, anchor="lm")
    return strip


def comparison_grid(
    rows: Sequence[Sequence[Image.Image]],
    titles: Sequence[str],
    row_titles: Sequence[str] | None = None,
    space: LabelSpace | None = None,
    cell_width: int = 420,
) -> Image.Image:
    """Images in a grid, with a title above each column, one beside each row, and a legend below.

    Args:
        rows: the images; every row has one a column, and all of a row the shape of its first.
        titles: one a column.
        row_titles: one a row, or None.
        space: label space to explain in the legend, or None.
        cell_width: width of a column in pixels; images are resized to it.

    Returns:
        RGB image.

    Raises:
        ValueError: no rows, or their lengths differ from those of the titles.
    """
    if not rows or any(len(row) != len(titles) for row in rows):
        raise ValueError(
            f"comparison_grid: expected rows of {len(titles)} images, got lengths {[len(row) for row in rows]}"
        )
    if row_titles is not None and len(row_titles) != len(rows):
        raise ValueError(f"comparison_grid: expected {len(rows)} row titles, got {len(row_titles)}")
    size = max(14, cell_width // 24)
    small_size = max(12, round(0.8 * size))
    font, small = title_font(size), title_font(small_size)
    left = GAP + (round(1.8 * size) if row_titles is not None else 0)
    heights = [max(1, round(cell_width * row[0].height / row[0].width)) for row in rows]
    head = round(2.2 * size)
    width = left + len(titles) * (cell_width + GAP)
    strip = legend(space, width - left - GAP, small_size) if space is not None else None
    height = head + sum(heights) + len(rows) * GAP + (strip.height + GAP if strip is not None else 0)
    grid = Image.new("RGB", (width, int(height)), BACKGROUND)
    draw = ImageDraw.Draw(grid)
    for column, title in enumerate(titles):
        middle = left + column * (cell_width + GAP) + cell_width / 2
        draw.text((middle, head / 2), _shorten(title, font, cell_width), INK, font, anchor="mm")
    top = head
    for position, row in enumerate(rows):
        if row_titles is not None:
            grid.paste(_upright(row_titles[position], small, heights[position]), (GAP // 2, top))
        for column, image in enumerate(row):
            cell = image.convert("RGB").resize((cell_width, heights[position]), Image.Resampling.LANCZOS)
            grid.paste(cell, (left + column * (cell_width + GAP), top))
        top += heights[position] + GAP
    if strip is not None:
        grid.paste(strip, (left, top))
    return grid


def _upright(text: str, font: ImageFont.FreeTypeFont, height: int) -> Image.Image:
    """Text that reads from bottom to top, centred in a strip of a height."""
    strip = Image.new("RGB", (height, int(1.6 * font.size)), BACKGROUND)
    middle = (height / 2, strip.height / 2)
    ImageDraw.Draw(strip).text(middle, _shorten(text, font, height), FAINT, font, anchor="mm")
    return strip.transpose(Image.Transpose.ROTATE_90)


def _shorten(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    # the end of a name (run, file) tells more than its beginning
    if _text_width(text, font) <= width:
        return text
    while len(text) > 1 and _text_width("…" + text, font) > width:
        text = text[1:]
    return "…" + text


def _text_width(text: str, font: ImageFont.FreeTypeFont) -> float:
    return font.getlength(text)
