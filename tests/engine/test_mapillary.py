"""Mapillary's variants against an independent rendition with arrays alone, for wide, narrow and square images."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from pmm_fast.engine import mapillary
from pmm_fast.engine.mapillary import mapillary_view

SIDE = 24


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapillary, "SIDE", SIDE)


def sample(width: int, height: int) -> tuple[Image.Image, np.ndarray]:
    rng = np.random.default_rng(width)
    pixels = rng.integers(1, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels), rng.integers(1, 19, (height, width), dtype=np.uint8)


def window(array: np.ndarray, first: int, fill: int) -> np.ndarray:
    """``SIDE`` columns from a first one, which may be negative, with a fill outside."""
    wide = np.pad(array, [(0, 0), (500, 500), *[(0, 0)] * (array.ndim - 2)], constant_values=fill)
    return wide[:, 500 + first : 500 + first + SIDE]


SIZES = [(40, 30), (30, 40), (17, 24), (24, 24), (41, 30), (35, 24), (9, 31), (10, 40)]


@pytest.mark.parametrize("variant", ["centred", "released"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_cut_and_padded(size: tuple[int, int], variant: str) -> None:
    image, labels = sample(*size)
    width = int(size[0] / size[1] * SIDE)
    pixels = np.array(image.resize((width, SIDE), Image.Resampling.BICUBIC))
    # the pixel under the centre of each new one
    rows, columns = (
        np.floor((np.arange(new) + 0.5) * old / new).astype(int) for new, old in ((SIDE, size[1]), (width, size[0]))
    )
    truth = labels[rows][:, columns]
    first, fill = round((width - SIDE) / 2), 255
    if variant == "released":
        # padded by the missing width on each side, but cut as if it were not
        missing, fill = max(0, SIDE - width), 0
        pixels = np.pad(pixels, [(0, 0), (missing, missing), (0, 0)])
        truth = np.pad(truth, [(0, 0), (missing, missing)])
    tested, found = mapillary_view(image, labels, variant)
    assert np.array_equal(np.array(tested), window(pixels, first, 0))
    assert np.array_equal(found, window(truth, first, fill)) and found.dtype == np.uint8


def test_what_is_wrong_in_the_released_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapillary, "SIDE", 1536)
    labels = np.full((4000, 3000), 7, np.uint8)
    image = Image.fromarray(np.full((4000, 3000, 3), 200, np.uint8))
    _, released = mapillary_view(image, labels, "released")
    # 1152 columns of image at height 1536, of which 192 are lost, and 37.5 % of the square is road
    assert (released == 7).sum() == 960 * 1536 and (released == 0).mean() == 0.375
    assert (released[:, :576] == 0).all()
    _, centred = mapillary_view(image, labels, "centred")
    assert (centred == 7).sum() == 1152 * 1536 and (centred == 255).mean() == 0.25
    assert (centred[:, 192:-192] == 7).all()


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_half_and_native(size: tuple[int, int]) -> None:
    image, labels = sample(*size)
    tested, found = mapillary_view(image, labels, "half")
    half = size[0] // 2, size[1] // 2
    assert tested.size == half and found.shape == half[::-1]
    assert np.array_equal(np.array(tested), np.array(image.resize(half, Image.Resampling.BICUBIC)))
    assert set(np.unique(found)) <= set(np.unique(labels))
    assert mapillary_view(image, labels, "native") == (image, labels)
