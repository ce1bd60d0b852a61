"""Activation maps by their formula, and the grid by where the colours stand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from pmm_fast.data import get_space
from pmm_fast.viz.activation import OPACITY, activation, activation_grid, default_classes, viridis
from pmm_fast.viz.overlays import GAP

SPACE = get_space("cityscapes19")


def test_weights_are_upsampled_and_then_stretched_at_every_pixel() -> None:
    weights = np.random.default_rng(0).integers(0, 64, (5, 3, 2)).astype(np.float32)
    # half steps, so that interpolation is exact
    found = activation(weights, (5, 3))
    large = F.interpolate(torch.from_numpy(weights)[None], (5, 3), mode="bilinear", align_corners=True)[0].numpy()
    low, high = large.min(0), large.max(0)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, (large - low) / (high - low))
    # of every pixel by itself: each has a least and a most read slot
    assert (found.min(0) == 0).all() and (found.max(0) == 1).all()


def test_size_one_and_equal_weights() -> None:
    single = activation(np.array([0.1, 0.3, 0.2]).reshape(3, 1, 1), (4, 6))
    assert single.shape == (3, 4, 6) and (single[0] == 0).all() and (single[1] == 1).all()
    assert np.ptp(single[2]) == 0 and 0 < single[2, 0, 0] < 1
    assert (activation(np.full((7, 2, 2), 1 / 7), (3, 3)) == 0).all()
    assert (activation(np.ones((1, 2, 2)), (3, 3)) == 0).all()


def test_viridis_is_that_of_matplotlib() -> None:
    values = np.linspace(0, 1, 256)
    expected = pytest.importorskip("matplotlib").colormaps["viridis"](values)[:, :3] * 255
    assert np.abs(viridis(values) - expected).max() < 6
    assert viridis(np.array([[-1.0, 2.0]])).tolist() == [[[68, 1, 84], [253, 231, 37]]]


def test_default_classes_are_the_released_ones_where_there_are_such() -> None:
    assert [SPACE.classes[k] for k in default_classes(SPACE)] == [
        *("building", "vegetation", "sky", "car", "sidewalk", "pole"),
    ]
    assert default_classes(get_space("camvid11")) == [1, 0, 8, 2]
    # sky alone would be a poor picture
    assert default_classes(get_space("idd_lite7")) == [0, 1, 2, 3, 4, 5]


def test_grid_has_the_map_of_each_class_in_its_panel() -> None:
    assignment = np.zeros((19, 2, 2), np.float32)
    assignment[2, :, 0] = assignment[8, :, 1] = 1
    grid = activation_grid(Image.new("RGB", (64, 32), (100, 100, 100)), assignment, SPACE, cell_width=80)
    pixels = np.asarray(grid).astype(int)
    assert grid.width == GAP + 4 * (80 + GAP)

    def panel(position: int) -> np.ndarray:
        left, top = GAP + position % 4 * (80 + GAP), 26 + position // 4 * (26 + 40 + GAP)
        return pixels[top : top + 40, left : left + 80]

    yellow, violet = ((1 - OPACITY) * 100 + OPACITY * viridis(np.array(end)) for end in (1.0, 0.0))
    assert (panel(0) == 100).all()
    for position, (left, right) in {1: (yellow, violet), 2: (violet, yellow), 3: (violet, violet)}.items():
        assert np.abs(panel(position)[:, 0] - left).max() <= 1 and np.abs(panel(position)[:, -1] - right).max() <= 1
    # seven panels, the second row without an eighth
    assert (panel(6)[0, 0] != 255).all() and (panel(7) == 255).all()


def test_chosen_classes_in_their_order() -> None:
    assignment = np.zeros((19, 1, 1), np.float32)
    assignment[5] = 1
    image = Image.new("RGB", (64, 32))
    grid = np.asarray(activation_grid(image, assignment, SPACE, [0, 5], cell_width=80))
    assert grid.shape[1] == GAP + 3 * (80 + GAP)
    # the image is black, then the slot that is not read, then the one that is
    brightness = [int(grid[40, GAP + position * (80 + GAP) + 40].astype(int).sum()) for position in range(3)]
    assert brightness[0] == 0 < brightness[1] < brightness[2]


def test_what_is_no_assignment_is_refused() -> None:
    image = Image.new("RGB", (64, 32))
    with pytest.raises(ValueError, match=r"expected floating point \[K, h, w\], got uint8 \[19, 2, 2\]"):
        activation(np.zeros((19, 2, 2), np.uint8), (4, 4))
    with pytest.raises(ValueError, match="finite"):
        activation(np.full((19, 2, 2), np.nan), (4, 4))
    with pytest.raises(ValueError, match=r"expected 19 slots \(cityscapes19\), got 7"):
        activation_grid(image, np.zeros((7, 2, 2)), SPACE)
    with pytest.raises(ValueError, match=r"classes: expected 0\.\.18, got 19"):
        activation_grid(image, np.zeros((19, 2, 2)), SPACE, [19])
