"""Qualitative grids: image, truth, what each network says, and where two networks differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from pmm_fast.data.labels import IGNORE, Colour, LabelSpace
from pmm_fast.viz.overlays import comparison_grid, overlay

# Okabe and Ito's vermillion and blue: told apart by colour-blind readers, and neither is near a grey photograph
ONLY_FIRST: Colour = (213, 94, 0)
ONLY_SECOND: Colour = (0, 114, 178)
BOTH_WRONG: Colour = (24, 24, 24)
BOTH_RIGHT: Colour = (196, 196, 196)
NOT_COUNTED: Colour = (255, 255, 255)
OPACITY = 0.8


@dataclass(frozen=True)
class Example:
    """One row of a comparison.

    Attributes:
        title: what the image is called.
        image: RGB.
        labels: the truth, uint8 ``[H, W]``.
        predictions: of each network, uint8 ``[H, W]``.
    """

    title: str
    image: Image.Image
    labels: np.ndarray
    predictions: Sequence[np.ndarray]


def difference(image: Image.Image, labels: np.ndarray, first: np.ndarray, second: np.ndarray) -> Image.Image:
    """Where two predictions are right and where they are not, over the image in grey.

    Where both are right the grey image is pale; pixels that only one has right, and those that both have wrong, are
    painted in the colours of ``difference_key``; ignored pixels are white.

    Args:
        image: RGB; resized to the labels' size if it differs.
        labels: the truth, uint8 ``[H, W]``, 255: not counted.
        first: a prediction, uint8 ``[H, W]``.
        second: another one.

    Returns:
        RGB image of the labels' size.

    Raises:
        ValueError: an array is not uint8 ``[H, W]`` of the labels' size.
    """
    for name, array in (("labels", labels), ("first", first), ("second", second)):
        if array.dtype != np.uint8 or array.ndim != 2 or array.shape != labels.shape:
            shape = list(labels.shape)
            raise ValueError(f"difference: {name}: expected uint8 {shape}, got {array.dtype} {list(array.shape)}")
    height, width = labels.shape
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    grey = np.asarray(image.convert("L"), np.float32)[..., None]
    # one of five cases a pixel: two bits for who is right, and not counted
    case = np.where(labels == IGNORE, 4, (first == labels) + 2 * (second == labels))
    colours = np.array([BOTH_WRONG, ONLY_FIRST, ONLY_SECOND, BOTH_RIGHT, NOT_COUNTED], np.float32)[case]
    opacity = np.array([OPACITY, OPACITY, OPACITY, 0.6, 1.0], np.float32)[case][..., None]
    return Image.fromarray(((1 - opacity) * grey + opacity * colours).round().astype(np.uint8))


def difference_key(first: str, second: str) -> list[tuple[str, Colour]]:
    """Names and colours of ``difference`` for two networks of these names: the ``key`` of a ``comparison_grid``."""
    return [
        ("both right", BOTH_RIGHT),
        (f"only {first} right", ONLY_FIRST),
        (f"only {second} right", ONLY_SECOND),
        ("both wrong", BOTH_WRONG),
        ("not counted", NOT_COUNTED),
    ]


def draw_comparison(
    examples: Sequence[Example], names: Sequence[str], space: LabelSpace, cell_width: int = 420
) -> Image.Image:
    """A row an image: the image, the truth, every network's prediction, and the ``difference`` of exactly two.

    Args:
        examples: the rows.
        names: of the networks, in the order of the predictions.
        space: classes and colours.
        cell_width: width of a column in pixels.

    Returns:
        RGB image, legends below.

    Raises:
        ValueError: no examples, or another number of predictions than names.
    """
    rows = []
    for example in examples:
        if len(example.predictions) != len(names):
            raise ValueError(
                f"draw_comparison: {example.title}: expected a prediction each of {', '.join(names)}, "
                f"got {len(example.predictions)}"
            )
        row = [example.image]
        row += [overlay(example.image, ids, space) for ids in (example.labels, *example.predictions)]
        if len(names) == 2:
            row.append(difference(example.image, example.labels, *example.predictions))
        rows.append(row)
    titles = ["image", "truth", *names]
    key: list[tuple[str, Colour]] = []
    if len(names) == 2:
        titles.append("difference")
        key = difference_key(*names)
    return comparison_grid(rows, titles, [example.title for example in examples], space, cell_width, key)
