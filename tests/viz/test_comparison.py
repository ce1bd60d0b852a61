"""Difference pictures pixel by pixel, and the columns of a comparison."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from pmm_fast.data import get_space
from pmm_fast.viz.comparison import (
    BOTH_RIGHT,
    BOTH_WRONG,
    ONLY_FIRST,
    ONLY_SECOND,
    Example,
    difference,
    difference_key,
    draw_comparison,
)
from pmm_fast.viz.overlays import GAP

SPACE = get_space("cityscapes19")
LABELS = np.array([[1, 1, 1, 1, 255]], np.uint8)
FIRST = np.array([[1, 1, 2, 2, 1]], np.uint8)
SECOND = np.array([[1, 3, 1, 2, 1]], np.uint8)


def test_difference_tells_who_is_right() -> None:
    found = np.asarray(difference(Image.new("RGB", (5, 1), (90, 90, 90)), LABELS, FIRST, SECOND))[0]
    for position, (colour, opacity) in enumerate(
        [(BOTH_RIGHT, 0.6), (ONLY_FIRST, 0.8), (ONLY_SECOND, 0.8), (BOTH_WRONG, 0.8), ((255, 255, 255), 1.0)]
    ):
        assert np.abs(found[position] - ((1 - opacity) * 90 + opacity * np.array(colour))).max() <= 0.5, position


def test_the_cases_look_different_whatever_the_image() -> None:
    for level in (0, 255):
        found = np.asarray(difference(Image.new("RGB", (5, 1), (level,) * 3), LABELS, FIRST, SECOND))[0].astype(int)
        gaps = [np.abs(a - b).max() for i, a in enumerate(found) for b in found[i + 1 :]]
        assert min(gaps) >= 20


def test_difference_has_the_size_of_the_labels_and_refuses_others() -> None:
    image = Image.new("RGB", (50, 10))
    assert difference(image, LABELS, FIRST, SECOND).size == (5, 1)
    with pytest.raises(ValueError, match=r"difference: second: expected uint8 \[1, 5\], got uint8 \[5, 1\]"):
        difference(image, LABELS, FIRST, SECOND.T)
    with pytest.raises(ValueError, match=r"difference: first: expected uint8 \[1, 5\], got int64 \[1, 5\]"):
        difference(image, LABELS, FIRST.astype(np.int64), SECOND)


def example(*predictions: int) -> Example:
    """An image in one colour, its truth class 1, and predictions that are one class each."""
    maps = [np.full((4, 8), prediction, np.uint8) for prediction in predictions]
    return Example("one", Image.new("RGB", (8, 4), (60, 60, 60)), np.full((4, 8), 1, np.uint8), maps)


def cells(grid: Image.Image, count: int) -> list[list[int]]:
    """The colour in the middle of each column of the first row."""
    pixels = np.asarray(grid)
    last = grid.width - GAP - 50
    return [pixels[60, last - (count - 1 - column) * (100 + GAP)].tolist() for column in range(count)]


def test_two_networks_get_a_difference_column() -> None:
    grid = draw_comparison([example(1, 2)], ["agg", "pinmem"], SPACE, cell_width=100)
    image, truth, first, second, differing = cells(grid, 5)
    assert image == [60] * 3 and truth == first != second
    assert np.abs(np.array(differing) - (0.2 * 60 + 0.8 * np.array(ONLY_FIRST))).max() <= 0.5
    colours = {colour for _, colour in grid.getcolors(1 << 20) or []}
    assert {ONLY_FIRST, ONLY_SECOND, BOTH_RIGHT, BOTH_WRONG} <= colours


@pytest.mark.parametrize("predictions", [(2,), (1, 2, 3)])
def test_one_or_three_networks_get_none(predictions: tuple[int, ...]) -> None:
    names = [f"run {prediction}" for prediction in predictions]
    grid = draw_comparison([example(*predictions)], names, SPACE, cell_width=100)
    columns = round((grid.width - 2 * GAP) / (100 + GAP))
    assert columns == 2 + len(names) and cells(grid, columns)[0] == [60] * 3
    assert ONLY_FIRST not in {colour for _, colour in grid.getcolors(1 << 20) or []}


def test_the_key_names_the_networks() -> None:
    assert [name for name, _ in difference_key("agg", "pinmem")] == [
        *("both right", "only agg right", "only pinmem right", "both wrong", "not counted"),
    ]


def test_a_missing_prediction_is_named() -> None:
    with pytest.raises(ValueError, match="draw_comparison: one: expected a prediction each of agg, pinmem, got 1"):
        draw_comparison([example(1)], ["agg", "pinmem"], SPACE)
    with pytest.raises(ValueError, match="expected rows of 3 images"):
        draw_comparison([], ["agg"], SPACE)
