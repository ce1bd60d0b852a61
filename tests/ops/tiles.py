"""Logits of tiles for ``ops.merge_tiles``, and their average and classes by another way, in float64."""

from __future__ import annotations

import random
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pmm_fast import ops
from pmm_fast.ops import backends
from tests.tolerances import FORWARD, UPSAMPLED, relative_error


class Tiling(NamedTuple):
    """Where tiles lie in an image, as the operator takes it."""

    tops: list[int]
    lefts: list[int]
    tile: tuple[int, int]
    size: tuple[int, int]


class Case(NamedTuple):
    """A call: classes, size of the logits, and the tiling."""

    classes: int
    logits: tuple[int, int]
    tiling: Tiling


def whole(height: int, width: int) -> Tiling:
    """An image as one tile."""
    return Tiling([0], [0], (height, width), (height, width))


GRID = Tiling([0, 0, 0, 5, 5, 5], [0, 13, 16] * 2, (8, 21), (13, 37))
CASES = {
    "whole": Case(19, (3, 9), whole(10, 33)),
    "small": Case(7, (3, 5), whole(5, 9)),
    "grid": Case(19, (3, 6), GRID),
    # neither a tile nor the overlap of two is a whole number of vectors, and the first has several blocks
    "wide": Case(3, (2, 41), Tiling([0, 0], [0, 43], (3, 158), (3, 201))),
    "copied": Case(5, (8, 21), GRID),
    "one logit": Case(4, (1, 1), GRID),
    "one row of logits": Case(4, (1, 5), GRID),
    # tiles smaller than their logits
    "shrunk": Case(3, (9, 60), GRID),
    "few rows": Case(19, (2, 100), Tiling([0, 0], [0, 60], (2, 90), (2, 150))),
    "one pixel": Case(5, (3, 4), whole(1, 1)),
    "one class": Case(1, (3, 4), GRID),
    "seventy classes": Case(70, (2, 3), whole(3, 7)),
    "many classes": Case(150, (2, 2), Tiling([0, 1], [0, 0], (3, 5), (4, 5))),
    # begins where a CUDA block's pixels end
    "side by side": Case(3, (3, 9), Tiling([0, 0, 7, 7], [0, 31, 0, 31], (7, 31), (14, 62))),
    "many tiles": Case(2, (2, 3), Tiling([0] * 70, list(range(70)), (3, 9), (3, 78))),
    "twice the same tile": Case(6, (2, 4), Tiling([0, 0, 2], [0, 0, 0], (4, 11), (6, 11))),
}
# for what is slow
FEW = ("small", "few rows", "one pixel", "twice the same tile")


def some_tiles(count: int) -> Tiling:
    """A tiling of ``count`` tiles of odd sizes: a grid that covers the image, and the rest anywhere."""
    rng = random.Random(count)
    rows = 2 if count >= 4 else 1
    columns = count // rows - (count > 6)
    height, width = rng.randint(9, 19), rng.randint(40, 90)
    tile = (min(height, height // rows + 3), min(width, width // columns + rng.randint(1, 9)))
    down, across = height - tile[0], width - tile[1]
    tops = [down * row // max(1, rows - 1) for row in range(rows) for _ in range(columns)]
    lefts = [across * column // max(1, columns - 1) for _ in range(rows) for column in range(columns)]
    for _ in range(count - len(tops)):
        tops.append(rng.randint(0, down))
        lefts.append(rng.randint(0, across))
    return Tiling(tops, lefts, tile, (height, width))


def make(case: Case, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Random logits of a case ``[T, K, h, w]``."""
    shape = (len(case.tiling.tops), case.classes, *case.logits)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def average_of(logits: Tensor, tiling: Tiling) -> Tensor:
    """float64 ``[K, H, W]``: each tile upsampled by PyTorch and added where it lies."""
    total = torch.zeros(logits.shape[1], *tiling.size, dtype=torch.float64)
    covering = torch.zeros(tiling.size, dtype=torch.float64)
    (height, width) = tiling.tile
    up = F.interpolate(logits.cpu().double(), tiling.tile, mode="bilinear", align_corners=True)
    for tile, top, left in zip(up, tiling.tops, tiling.lefts, strict=True):
        total[:, top : top + height, left : left + width] += tile
        covering[top : top + height, left : left + width] += 1
    return total / covering


def assert_merged(logits: Tensor, tiling: Tiling) -> None:
    """What the operator computes on the backend asked for, all three ways, against :func:`average_of`."""
    expected = average_of(logits, tiling)
    average = ops.merge_tiles(logits, *tiling)
    assert average.dtype == torch.float32 and average.is_contiguous() and average.device == logits.device
    close = UPSAMPLED if backends.requested() == "reference" else FORWARD[torch.float32]
    assert relative_error(average.cpu(), expected) <= close
    classes, none = ops.segment_tiles(logits, *tiling)
    again, confidence = ops.segment_tiles(logits, *tiling, confidence=True)
    assert none is None and confidence is not None and torch.equal(classes, again)
    assert classes.dtype == torch.uint8 and classes.shape == tiling.size and classes.is_contiguous()
    assert_best(classes, expected, close)
    assert confidence.dtype == torch.float32 and confidence.is_contiguous()
    # an error of a logit is one of its exponential, relative to that
    allowed = 2 * close * max(1.0, float(expected.abs().max()))
    assert relative_error(confidence.cpu(), expected.softmax(0).amax(0)) <= allowed


def assert_best(classes: Tensor, average: Tensor, close: float) -> None:
    """The class of each pixel is the best one; where another was chosen, seldom, the two are equal but for rounding."""
    best, chosen = average.argmax(0), classes.cpu().long()
    behind = average.amax(0) - average.gather(0, chosen.unsqueeze(0))[0]
    assert behind.max() <= 2 * close * average.abs().max()
    assert (best != chosen).sum() <= max(1, 1e-3 * best.numel())
