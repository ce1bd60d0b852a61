"""Label maps painted over images, and grids that compare them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pmm_fast.data.contact_sheet import title_font
from pmm_fast.data.labels import Colour, LabelSpace, colourise

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
    colours = colourise(labels, space)
    height, width = labels.shape
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    pixels = np.asarray(image.convert("RGB"))
    painted = pixels * np.float32(1 - alpha)
    painted += colours * np.float32(alpha)
    unknown = labels >= space.num_classes
    if unknown.any():
        seen = pixels[unknown].astype(np.float32)
        painted[unknown] = 0.6 * seen.mean(1, keepdims=True) + 0.4 * seen
    return Image.fromarray(np.rint(painted, out=painted).astype(np.uint8))


def swatches(entries: Sequence[tuple[str, Colour]], width: int, size: int = 15) -> Image.Image:
    """A strip of colours with their names, wrapped to a width.

    Args:
        entries: name and colour of each; at least one.
        width: of the strip, in pixels.
        size: of the text, in pixels.

    Returns:
        RGB image of that width.
    """
    font, swatch = title_font(size), round(1.1 * size)
    column = swatch + size // 2 + 2 * size + math.ceil(max(font.getlength(name) for name, _ in entries))
    columns = max(1, min(len(entries), width // column))
    rows = -(-len(entries) // columns)
    line = round(1.7 * size)
    strip = Image.new("RGB", (width, rows * line + GAP), BACKGROUND)
    draw = ImageDraw.Draw(strip)
    for position, (name, colour) in enumerate(entries):
        left, top = position % columns * column, position // columns * line + GAP // 2
        draw.rectangle((left, top, left + swatch, top + swatch), fill=colour, outline=INK)
        fitting = shorten(name, font, width - swatch - size // 2)
        draw.text((left + swatch + size // 2, top + swatch / 2), fitting, INK, font, anchor="lm")
    return strip


def legend(space: LabelSpace, width: int, size: int = 15) -> Image.Image:
    """The ``swatches`` of a label space's classes."""
    return swatches(list(zip(space.classes, space.colours, strict=True)), width, size)


def comparison_grid(
    rows: Sequence[Sequence[Image.Image]],
    titles: Sequence[str],
    row_titles: Sequence[str] | None = None,
    space: LabelSpace | None = None,
    cell_width: int = 420,
    key: Sequence[tuple[str, Colour]] = (),
) -> Image.Image:
    """Images in a grid, with a title above each column, one beside each row, and legends below.

    Args:
        rows: the images; every row has one a column, and all of a row the shape of its first.
        titles: one a column.
        row_titles: one a row, or None.
        space: label space to explain in the legend, or None.
        cell_width: width of a column in pixels; images are resized to it.
        key: names and colours to explain in a legend of their own.

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
    strips = [legend(space, width - left - GAP, small_size)] if space is not None else []
    strips += [swatches(key, width - left - GAP, small_size)] if key else []
    height = head + sum(heights) + len(rows) * GAP + sum(strip.height + GAP for strip in strips)
    grid = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(grid)
    for column, title in enumerate(titles):
        middle = left + column * (cell_width + GAP) + cell_width / 2
        draw.text((middle, head / 2), shorten(title, font, cell_width), INK, font, anchor="mm")
    top = head
    for position, row in enumerate(rows):
        if row_titles is not None:
            grid.paste(upright(row_titles[position], small, heights[position]), (GAP // 2, top))
        for column, image in enumerate(row):
            cell = image.convert("RGB").resize((cell_width, heights[position]), Image.Resampling.LANCZOS)
            grid.paste(cell, (left + column * (cell_width + GAP), top))
        top += heights[position] + GAP
    for strip in strips:
        grid.paste(strip, (left, top))
        top += strip.height + GAP
    return grid


def upright(text: str, font: ImageFont.FreeTypeFont, height: int, ink: Colour = FAINT) -> Image.Image:
    """Text that reads from bottom to top, centred in a strip of a height."""
    strip = Image.new("RGB", (height, int(1.6 * font.size)), BACKGROUND)
    middle = (height / 2, strip.height / 2)
    ImageDraw.Draw(strip).text(middle, shorten(text, font, height), ink, font, anchor="mm")
    return strip.transpose(Image.Transpose.ROTATE_90)


def shorten(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """The text, or as much of its end as a width has room for: the end of a name (run, file) tells more."""
    if font.getlength(text) <= width:
        return text
    while len(text) > 1 and font.getlength("…" + text) > width:
        text = text[1:]
    return "…" + text
