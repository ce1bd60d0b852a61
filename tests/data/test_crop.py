"""The compiled crop against Pillow's resize of the whole image: the same levels, on every instruction set."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from pmm_fast.data import crop
from pmm_fast.data.crop import resized_crop
from pmm_fast.data.transforms import Window, draw_window, footprint
from pmm_fast.ops import extension

compiled = pytest.mark.skipif(extension.missing("_C") is not None, reason="no compiled module")


def noise(height: int, width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def plain(pixels: np.ndarray, window: Window, mirror: bool) -> np.ndarray:
    """Everything resized, columns first, then cut out of a black canvas."""
    image = Image.fromarray(pixels).resize((window.scaled[0], pixels.shape[0]), Image.Resampling.BICUBIC)
    image = image.resize(window.scaled, Image.Resampling.BICUBIC)
    box = (window.left, window.top, window.left + window.size[0], window.top + window.size[1])
    # Pillow's crop is black outside the image
    result = np.asarray(image.crop(box))
    return result[:, ::-1] if mirror else result


def ours(pixels: np.ndarray, window: Window, mirror: bool) -> np.ndarray:
    size = (pixels.shape[1], pixels.shape[0])
    left, top, right, bottom = box = footprint(size, window)
    # what is not written stays 77
    out = np.full((*window.size[::-1], 3), 77, np.uint8)
    resized_crop(np.ascontiguousarray(pixels[top:bottom, left:right]), size, box, window, mirror, out)
    return out


@pytest.fixture(params=["avx512", "avx2", "portable"])
def instruction_set(request: pytest.FixtureRequest):
    module = extension.load("_C")
    if request.param not in module.instruction_sets():
        pytest.skip(f"no {request.param} here")
    before = module.instruction_set()
    module.use_instruction_set(request.param)
    yield request.param
    module.use_instruction_set(before)


@compiled
def test_equal_to_pillow_on_the_whole_image(instruction_set: str) -> None:
    assert crop.crop_backend() == "C++"
    rng = np.random.default_rng(1)
    for seed in range(250):
        height, width, *target = (int(side) for side in rng.integers(1, 100, 4))
        pixels = noise(height, width, seed)
        window = draw_window((width, height), (target[0], target[1]), (0.3, 3.0), rng)
        mirror = bool(rng.integers(2))
        np.testing.assert_array_equal(ours(pixels, window, mirror), plain(pixels, window, mirror))


@compiled
@pytest.mark.parametrize("factor", [0.5, 0.731, 1.0, 1.37, 2.0])
def test_equal_at_full_size(factor: float) -> None:
    pixels = noise(526, 957, 0)
    window = Window((int(957 * factor), int(526 * factor)), int(90 * factor), -3, (384, 256))
    np.testing.assert_array_equal(ours(pixels, window, False), plain(pixels, window, False))


def test_pillow_where_nothing_was_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "missing", lambda name: "not part of this build")
    assert crop.crop_backend() == "Pillow"
    rng = np.random.default_rng(2)
    for mirror in (False, True):
        pixels = noise(60, 90, 3)
        window = draw_window((90, 60), (40, 130), (0.5, 2.0), rng)
        difference = ours(pixels, window, mirror).astype(int) - plain(pixels, window, mirror)
        assert np.abs(difference).max() <= 2 and (difference != 0).mean() < 1e-2


def test_wrong_arrays() -> None:
    window, box = Window((8, 8), 0, 0, (4, 4)), (0, 0, 8, 8)
    good, out = noise(8, 8, 0), np.empty((4, 4, 3), np.uint8)
    with pytest.raises(ValueError, match=r"^part: expected contiguous uint8 \[8, 8, 3\], got float64 \[8, 8, 3\]"):
        resized_crop(good.astype(float), (8, 8), box, window, False, out)
    with pytest.raises(ValueError, match=r"^part: expected contiguous uint8 \[8, 8, 3\], got uint8 \[8, 8, 3\]"):
        resized_crop(good[:, ::-1], (8, 8), box, window, False, out)
    with pytest.raises(ValueError, match=r"^out: expected contiguous uint8 \[4, 4, 3\], got uint8 \[5, 4, 3\]"):
        resized_crop(good, (8, 8), box, window, False, np.empty((5, 4, 3), np.uint8))
    out.flags.writeable = False
    with pytest.raises(ValueError, match=r"^out: expected an array that can be written to"):
        resized_crop(good, (8, 8), box, window, False, out)


@pytest.mark.parametrize("box", [(0, 0, 4, 4), (-1, 0, 7, 8), (3, 3, 101, 100), (40, 0, 100, 100)])
def test_a_part_that_is_too_small_or_elsewhere(box: tuple[int, int, int, int]) -> None:
    part, out = np.zeros((box[3] - box[1], box[2] - box[0], 3), np.uint8), np.empty((4, 4, 3), np.uint8)
    with pytest.raises(ValueError, match=r"^part: expected "):
        resized_crop(part, (100, 100), box, Window((100, 100), 30, 30, (4, 4)), False, out)
