"""Overlays pixel by pixel, and grids by where things stand."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from pmm_fast.data import get_space
from pmm_fast.viz.overlays import BACKGROUND, GAP, comparison_grid, legend, overlay, swatches

SPACE = get_space("cityscapes19")


def plain(colour: tuple[int, int, int], width: int = 8, height: int = 4) -> Image.Image:
    return Image.new("RGB", (width, height), colour)


def test_overlay_mixes_colours_and_greys_what_is_ignored() -> None:
    labels = np.array([[0, 10], [255, 19]], np.uint8)
    result = np.asarray(overlay(plain((100, 150, 50), 2, 2), labels, SPACE, alpha=0.25))
    for position, label in (((0, 0), 0), ((0, 1), 10)):
        expected = 0.75 * np.array([100, 150, 50]) + 0.25 * np.array(SPACE.colours[label])
        assert np.abs(result[position] - expected).max() <= 0.5
    assert result[1].tolist() == [[100, 120, 80]] * 2


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_overlay_at_its_ends(alpha: float) -> None:
    result = np.asarray(overlay(plain((9, 8, 7)), np.full((4, 8), 13, np.uint8), SPACE, alpha))
    assert (result == (SPACE.colours[13] if alpha else (9, 8, 7))).all()


def test_overlay_has_the_size_of_the_labels() -> None:
    assert overlay(plain((1, 2, 3), 30, 20), np.zeros((10, 15), np.uint8), SPACE).size == (15, 10)


def test_overlay_refuses_other_alphas_and_labels() -> None:
    with pytest.raises(ValueError, match=r"alpha: expected 0\.\.1, got 1\.5"):
        overlay(plain((0, 0, 0)), np.zeros((4, 8), np.uint8), SPACE, 1.5)
    with pytest.raises(ValueError, match=r"labels: expected uint8 \[H, W\]"):
        overlay(plain((0, 0, 0)), np.zeros((4, 8)), SPACE)


@pytest.mark.parametrize("width", [90, 300, 2000])
def test_legend_shows_every_colour_at_any_width(width: int) -> None:
    strip = legend(SPACE, width)
    assert strip.width == width
    shown = {colour for _, colour in strip.getcolors(1 << 20) or []}
    assert set(SPACE.colours) <= shown


def test_grid_has_images_where_they_belong() -> None:
    red, green, blue, yellow = (200, 0, 0), (0, 200, 0), (0, 0, 200), (250, 240, 9)
    rows = [[plain(red), plain(green)], [plain(blue, 4, 4), plain(yellow, 4, 4)]]
    grid = comparison_grid(rows, ["image", "truth"], ["one", "two"], SPACE, cell_width=100)
    pixels = np.asarray(grid)
    boxes = {}
    for name, colour in {"red": red, "green": green, "blue": blue, "yellow": yellow}.items():
        y, x = np.nonzero((pixels == colour).all(2))
        boxes[name] = (x.min(), y.min(), x.max() - x.min() + 1, y.max() - y.min() + 1)
    assert [box[2:] for box in boxes.values()] == [(100, 50), (100, 50), (100, 100), (100, 100)]
    assert boxes["green"][0] == boxes["red"][0] + 100 + GAP == boxes["yellow"][0]
    assert boxes["blue"][1] == boxes["red"][1] + 50 + GAP
    # titles above, row titles to the left, legend below
    inked = (pixels != BACKGROUND).any(2)
    assert inked[: boxes["red"][1]].any() and inked[:, : boxes["red"][0]].any()
    assert inked[boxes["blue"][1] + 100 + GAP :].any()
    bare = comparison_grid(rows, ["", ""], cell_width=100)
    assert bare.width < grid.width and bare.height < grid.height


def test_a_key_stands_below_the_legend_of_the_classes() -> None:
    key = [("good", (1, 2, 3)), ("bad", (9, 8, 7))]
    row = [[plain((200, 0, 0))]]
    pixels = np.asarray(comparison_grid(row, ["a"], space=SPACE, cell_width=300, key=key))
    tops = [np.nonzero((pixels == colour).all(2))[0].min() for colour in (SPACE.colours[18], *dict(key).values())]
    assert tops[0] < tops[1] == tops[2]
    without = comparison_grid(row, ["a"], space=SPACE, cell_width=300)
    assert without.height == pixels.shape[0] - swatches(key, 300, 12).height - GAP


def test_swatches_stand_in_order_and_side_by_side() -> None:
    strip = np.asarray(swatches([("one", (1, 2, 3)), ("two", (4, 5, 6)), ("three", (7, 8, 9))], 800))
    lefts = [np.nonzero((strip == colour).all(2))[1].min() for colour in ((1, 2, 3), (4, 5, 6), (7, 8, 9))]
    assert lefts[0] < lefts[1] < lefts[2] < 400


def test_long_titles_keep_to_their_column() -> None:
    grid = comparison_grid([[plain((0, 0, 0))] * 2], ["a very long title " * 9, ""], cell_width=100)
    head = np.asarray(grid)[:20]
    inked = np.nonzero((head != BACKGROUND).any((0, 2)))[0]
    assert inked.min() >= GAP and inked.max() < GAP + 100


def test_grid_refuses_rows_of_other_lengths() -> None:
    with pytest.raises(ValueError, match=r"rows of 2 images, got lengths \[1\]"):
        comparison_grid([[plain((0, 0, 0))]], ["a", "b"])
    with pytest.raises(ValueError, match="expected 1 row titles, got 2"):
        comparison_grid([[plain((0, 0, 0))]], ["a"], ["x", "y"])
    with pytest.raises(ValueError, match="expected rows of 1 images"):
        comparison_grid([], ["a"])
