"""One picture that shows whether a domain was read rightly: samples with their labels painted over them, and the share
of every class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pmm_fast.data.labels import IGNORE, LabelSpace, colourise

COLUMNS = 4
SAMPLES = 12
CELL_WIDTH = 420

BACKGROUND = (250, 250, 248)
INK = (30, 32, 36)
FAINT = (120, 122, 126)
IGNORED = (20, 90)

MARGIN, GAP = 28, 12
CAPTION = 20
LEGEND_ROW, LEGEND_COLUMN, SWATCH = 30, 240, 18
OPACITY = 0.6


@dataclass(frozen=True)
class Sample:
    """One sample of a sheet.

    Attributes:
        caption: what it is called.
        image: RGB.
        labels: uint8 ``[H, W]``.
    """

    caption: str
    image: Image.Image
    labels: np.ndarray


def cell(image: Image.Image, labels: np.ndarray, space: LabelSpace, width: int = CELL_WIDTH) -> Image.Image:
    """A sample in small: the image, and below it the image under its labels; what is ignored is hatched.

    Args:
        image: RGB.
        labels: uint8 ``[H, W]`` of the same size.
        space: classes and colours.
        width: of the result, pixels.
    """
    height = max(1, round(width * image.height / image.width))
    small = image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)
    ids = np.asarray(Image.fromarray(labels).resize((width, height), Image.Resampling.NEAREST))
    colours = colourise(ids, space)
    ignored = ids == IGNORE
    colours[ignored] = _hatch(height, width)[ignored]
    both = Image.new("RGB", (width, 2 * height + 2), BACKGROUND)
    both.paste(small, (0, 0))
    both.paste(Image.blend(small, Image.fromarray(colours), OPACITY), (0, height + 2))
    return both


def _hatch(height: int, width: int) -> np.ndarray:
    """Diagonal stripes, uint8 ``[height, width, 3]``: dark grey is the colour of buildings."""
    stripe = np.add.outer(np.arange(height), np.arange(width)) // 4 % 2
    return np.repeat(np.array(IGNORED, np.uint8)[stripe][..., None], 3, axis=2)


def contact_sheet(
    title: str, facts: Sequence[str], samples: Sequence[Sample], space: LabelSpace, shares: Sequence[float]
) -> Image.Image:
    """Samples in a grid below a title, and a legend with the share of every class.

    Args:
        title: of the sheet.
        facts: lines below the title.
        samples: at least one.
        space: classes and colours of the labels.
        shares: of all pixels, for each class and then for what is ignored; 0 greys a class out.

    Returns:
        RGB image.

    Raises:
        ValueError: no samples, or another number of shares.
    """
    if not samples or len(shares) != space.num_classes + 1:
        raise ValueError(
            f"contact_sheet: expected samples and {space.num_classes + 1} shares, got {len(samples)}, {len(shares)}"
        )
    cells = [cell(sample.image, sample.labels, space) for sample in samples]
    columns = min(COLUMNS, len(cells))
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    heights = [max(picture.height for picture in row) + CAPTION + GAP for row in rows]
    # room for two columns of the legend even where there is one sample
    width = 2 * MARGIN + max(columns * (CELL_WIDTH + GAP) - GAP, 2 * LEGEND_COLUMN)
    head = MARGIN + 40 + 24 * len(facts) + GAP
    legend = _legend(space, shares, width - 2 * MARGIN)
    sheet = Image.new("RGB", (width, head + sum(heights) + GAP + legend.height + MARGIN), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN), title, INK, title_font(28), anchor="lt")
    for line, fact in enumerate(facts):
        draw.text(
            (MARGIN, MARGIN + 40 + 24 * line), _fit(fact, 16, width - 2 * MARGIN), FAINT, title_font(16), anchor="lt"
        )
    top = head
    for position, (row, height) in enumerate(zip(rows, heights, strict=True)):
        for column, picture in enumerate(row):
            left = MARGIN + column * (CELL_WIDTH + GAP)
            caption = samples[position * columns + column].caption
            draw.text((left, top + CAPTION / 2), _fit(caption, 13, CELL_WIDTH), FAINT, title_font(13), anchor="lm")
            sheet.paste(picture, (left, top + CAPTION))
        top += height
    sheet.paste(legend, (MARGIN, top + GAP))
    return sheet


def _legend(space: LabelSpace, shares: Sequence[float], width: int) -> Image.Image:
    names = [*space.classes, "ignored"]
    columns = max(1, width // LEGEND_COLUMN)
    rows = -(-len(names) // columns)
    strip = Image.new("RGB", (width, rows * LEGEND_ROW), BACKGROUND)
    draw = ImageDraw.Draw(strip)
    step = width // columns
    for position, (name, share) in enumerate(zip(names, shares, strict=True)):
        # down the columns, as one reads a list
        left, middle = position // rows * step, position % rows * LEGEND_ROW + LEGEND_ROW // 2
        top = middle - SWATCH // 2
        if position == space.num_classes:
            strip.paste(Image.fromarray(_hatch(SWATCH, SWATCH)), (left, top))
        else:
            colour = space.colours[position]
            box = (left, top, left + SWATCH - 1, top + SWATCH - 1)
            draw.rectangle(box, fill=colour if share else BACKGROUND, outline=colour)
        ink = INK if share else FAINT
        draw.text((left + SWATCH + 10, middle), name, ink, title_font(15), anchor="lm")
        draw.text((left + LEGEND_COLUMN - 34, middle), percent(share), ink, title_font(15), anchor="rm")
    return strip


def percent(share: float) -> str:
    """A share in words: ``12.34 %``, ``<0.01 %``, ``never``."""
    if share == 0:
        return "never"
    return f"{100 * share:.2f} %" if share >= 0.0001 else "<0.01 %"


def _fit(text: str, size: int, width: int) -> str:
    """The text, or as much of its end as the width has room for: the end of a path tells more."""
    font = title_font(size)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength("..." + text) > width:
        text = text[1:]
    return "..." + text


@lru_cache(maxsize=8)
def title_font(size: int) -> ImageFont.FreeTypeFont:
    """The font of titles and legends.

    Args:
        size: in pixels.

    Raises:
        ImportError: Pillow was built without FreeType.
    """
    font = ImageFont.load_default(size=size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise ImportError("drawing titles needs Pillow with FreeType support: pip install --force-reinstall pillow")
    return font
