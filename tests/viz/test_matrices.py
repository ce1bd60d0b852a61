"""Confusion and similarity cell by cell."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from pmm_fast.viz.matrices import _NOTHING, _colour, _cosine, draw_confusion, draw_similarity
from pmm_fast.viz.overlays import BACKGROUND, FAINT, INK

CLASSES = ("road", "sky", "car")
WHITE, BLUE = (255, 255, 255), (8, 48, 107)


def cells(picture: Image.Image, count: int, cell: int) -> np.ndarray:
    """The cells, uint8 ``[K, K, cell - 1, cell - 1, 3]``, found by the frame around them."""
    pixels = np.asarray(picture)
    frame = (pixels == FAINT).all(2)
    top = int(np.nonzero(frame.sum(1) > count * cell)[0][0])
    left = int(np.nonzero(frame[top])[0][0])
    side = count * cell
    inside = pixels[top + 1 : top + 1 + side, left + 1 : left + 1 + side]
    return inside.reshape(count, cell, count, cell, 3).swapaxes(1, 2)[:, :, :-1, :-1]


def corners(picture: Image.Image, count: int = 3, cell: int = 64) -> list[list[tuple[int, ...]]]:
    """The colour of every cell, away from its number."""
    return [[tuple(int(c) for c in square[2, 2]) for square in row] for row in cells(picture, count, cell)]


def written(picture: Image.Image, count: int = 3, cell: int = 64) -> list[list[bool]]:
    """Which cells hold a number."""
    return [[bool((square != square[2, 2]).any()) for square in row] for row in cells(picture, count, cell)]


def test_confusion_shows_shares_of_the_truth() -> None:
    matrix = np.array([[6, 2, 0], [0, 0, 0], [0, 0, 10**12]])
    picture = draw_confusion(matrix, CLASSES, "title")
    three, one = (tuple(int(c) for c in _colour(np.array(share))) for share in (0.75, 0.25))
    # columns are the prediction, and a class without truth is grey
    assert corners(picture) == [[three, one, WHITE], [_NOTHING] * 3, [WHITE, WHITE, BLUE]]
    assert written(picture) == [[True, True, False], [False] * 3, [False, False, True]]


def test_similarity_is_of_directions_and_marks_empty_slots() -> None:
    memory = np.array([[3, 4, 0], [0, 0, 0], [-4, 3, 0]], np.float32)
    expected = [[BLUE, _NOTHING, WHITE], [_NOTHING] * 3, [WHITE, _NOTHING, BLUE]]
    picture = draw_similarity(memory, CLASSES)
    assert corners(picture) == expected
    assert written(picture) == [[True, False, False], [False] * 3, [False, False, True]]
    longer = draw_similarity(memory * np.float32(64), CLASSES)
    assert longer.tobytes() == picture.tobytes()


def test_opposite_slots_are_brown_and_the_bar_goes_below_zero() -> None:
    memory = np.array([[1, 0], [-1, 0], [0, 1]], np.float32)
    picture = draw_similarity(memory, CLASSES)
    brown = (127, 59, 8)
    assert corners(picture) == [[BLUE, brown, WHITE], [brown, BLUE, WHITE], [WHITE, WHITE, BLUE]]
    bar = np.asarray(picture)[:, -155:]
    assert (bar == brown).all(2).any()
    plain = np.asarray(draw_similarity(np.abs(memory[[0, 2, 2]]), CLASSES))
    assert not (plain[:, -155:] == brown).all(2).any()


def test_colours_darken_evenly_to_both_sides() -> None:
    lightness = _colour(np.linspace(0, 1, 101)).astype(int) @ (299, 587, 114)
    below = _colour(np.linspace(0, -1, 101)).astype(int) @ (299, 587, 114)
    for values in (lightness, below):
        steps = -np.diff(values) / (values[0] - values[-1])
        assert steps.min() > 0.003 and steps.max() < 0.03


def test_names_of_absent_classes_are_faint() -> None:
    # the second class is not in the truth but was predicted: its row is faint, its column is not
    matrix = np.array([[5, 5, 0], [0, 0, 0], [0, 0, 5]])
    some = np.asarray(draw_confusion(matrix, CLASSES))
    every = np.asarray(draw_confusion(matrix + 1, CLASSES))
    frame = (some == FAINT).all(2)
    top = int(np.nonzero(frame.sum(1) > 3 * 64)[0][0])
    left = int(np.nonzero(frame[top])[0][0])
    row, below = slice(top + 64, top + 128), slice(top + 196, None)
    assert some[row, :left].min() > every[row, :left].min() == min(INK)
    assert (some[below, :left] == every[below, :left]).all()
    assert some[below, left + 64 : left + 128].min() == min(INK)


def test_numbers_that_do_not_fit_are_left_out() -> None:
    memory = np.random.default_rng(0).random((40, 8)).astype(np.float32) + 0.1
    names = [f"class {index}" for index in range(40)]
    picture = draw_similarity(memory, names)
    assert not np.array(written(picture, 40, 18))[~np.eye(40, dtype=bool)].any()
    small = draw_similarity(memory[:19], names[:19])
    assert np.array(written(small, 19, 37)).all()


@pytest.mark.parametrize(
    ("value", "text"), [(0.07, ".07"), (-0.31, "-.31"), (1.0, "1"), (-1.0, "-1"), (0.999, "1"), (-0.004, "0")]
)
def test_cosines_are_short(value: float, text: str) -> None:
    assert _cosine(value) == text


def test_long_names_and_titles_stay_inside() -> None:
    picture = np.asarray(draw_confusion(np.eye(2, dtype=np.int64), ["a name without end " * 9, "b"], "title " * 99))
    for edge in (picture[0], picture[-1], picture[:, 0], picture[:, -1]):
        assert (edge == BACKGROUND).all()


def test_what_is_no_confusion_or_memory_is_refused() -> None:
    with pytest.raises(ValueError, match=r"draw_confusion: expected integers \[3, 3\].*got int64 \[2, 2\]"):
        draw_confusion(np.zeros((2, 2), np.int64), CLASSES)
    with pytest.raises(ValueError, match="got float64"):
        draw_confusion(np.zeros((3, 3)), CLASSES)
    with pytest.raises(ValueError, match="expected numbers of pixels, got -1"):
        draw_confusion(np.full((3, 3), -1), CLASSES)
    with pytest.raises(ValueError, match=r"draw_similarity: expected floating point \[3, C\], got int64 \[3, 4\]"):
        draw_similarity(np.zeros((3, 4), np.int64), CLASSES)
    with pytest.raises(ValueError, match="finite"):
        draw_similarity(np.full((3, 4), np.nan), CLASSES)
