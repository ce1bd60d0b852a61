"""Logits of overlapping tiles to one map, or straight to classes: upsampling, averaging, argmax.

T tiles of th x tw pixels, K classes, h x w logits a tile, H x W pixels of the image.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pmm_fast.ops import reference
from pmm_fast.ops.backends import dispatch, register, register_kernels
from pmm_fast.ops.chain import kernels
from pmm_fast.ops.checks import check_tiles

_NAME = "merge_tiles"
# what a call is for: the average; the classes; the classes and how sure they are
AVERAGE, CLASSES, CONFIDENCE = range(3)
MOST_CLASSES = 256


def merge_tiles(
    logits: Tensor,  # [T, K, h, w]
    tops: Sequence[int],
    lefts: Sequence[int],
    tile: tuple[int, int],
    size: tuple[int, int],
) -> Tensor:
    """Upsample the logits of tiles and average them over all tiles that cover a pixel.

    out_k(y, x) = mean over the tiles t with the pixel inside of up(logits[t])_k(y - tops[t], x - lefts[t]),
    up bilinear with corners on corners, to ``tile``.  A whole image is one tile.  A tile of the mirrored image is one
    more tile, whose logits the caller turns round.

    Args:
        logits: ``[T, K, h, w]``, float64, float32, bf16 or fp16, any strides.
        tops: the first row of each tile in the image, T numbers.
        lefts: the first column of each tile.
        tile: ``(th, tw)``, the size of a tile in the image.
        size: ``(H, W)``, the size of the image.

    Returns:
        float32 ``[K, H, W]``, contiguous, on the logits' device.

    Raises:
        ValueError: wrong shape or dtype, no tiles, a tile that is not inside the image, or a pixel that no tile covers.

    Note:
        Not differentiable: the result carries no gradient.  Computed in float32 (float64 for float64 logits).
        Formulas: docs/ops/merge_tiles.md.  Released code ``eval.py:148-274``, which averages on the host.
    """
    return _call(_NAME, logits, tops, lefts, tile, size, AVERAGE)[0]


def segment_tiles(
    logits: Tensor,  # [T, K, h, w]
    tops: Sequence[int],
    lefts: Sequence[int],
    tile: tuple[int, int],
    size: tuple[int, int],
    confidence: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The class of each pixel, argmax of :func:`merge_tiles`, and if asked its probability; nothing larger is stored.

    Args:
        logits: as in :func:`merge_tiles`, of at most 256 classes.
        tops: as there.
        lefts: as there.
        tile: as there.
        size: as there.
        confidence: whether to return the softmax of the average at the class chosen.

    Returns:
        (classes uint8 ``[H, W]``, confidence float32 ``[H, W]`` or None).  Of equal classes the lowest is taken; NaN
        counts as the largest number, as in ``torch.argmax``, and its confidence is NaN.

    Raises:
        ValueError: as :func:`merge_tiles`; too many classes for uint8.

    Note:
        The operator of :func:`merge_tiles` in all else: backends, precision, no gradient.
    """
    wanted = CONFIDENCE if confidence else CLASSES
    _, classes, sure = _call("segment_tiles", logits, tops, lefts, tile, size, wanted)
    return classes, sure if confidence else None


def _call(
    caller: str,
    logits: Tensor,
    tops: Sequence[int],
    lefts: Sequence[int],
    tile: tuple[int, int],
    size: tuple[int, int],
    wanted: int,
) -> tuple[Tensor, Tensor, Tensor]:
    check_tiles(caller, logits, tops, lefts, tile, size)
    if wanted != AVERAGE and logits.shape[1] > MOST_CLASSES:
        raise ValueError(f"{caller}: logits must have at most {MOST_CLASSES} classes, got {logits.shape[1]}")
    return dispatch(_NAME, logits.detach(), list(tops), list(lefts), list(tile), list(size), wanted)


@torch.library.custom_op("pmm_fast::merge_tiles", mutates_args=())
def _forward(
    logits: Tensor,
    tops: Sequence[int],
    lefts: Sequence[int],
    tile: Sequence[int],
    size: Sequence[int],
    wanted: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    places = torch.tensor([list(tops), list(lefts)])
    if logits.device.type == "cuda":
        places = places.pin_memory().to(logits.device, non_blocking=True)
    average, classes, confidence = results = _empty(logits, tops, lefts, tile, size, wanted, backend)
    kernels(_NAME, backend).forward(logits, places, tile, size, average, classes, confidence)
    return results


@_forward.register_fake
def _empty(
    logits: Tensor,
    tops: Sequence[int],
    lefts: Sequence[int],
    tile: Sequence[int],
    size: Sequence[int],
    wanted: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The average, the classes and the confidence; without elements where they are not wanted."""
    return (
        logits.new_empty((logits.shape[1], *size) if wanted == AVERAGE else (0,), dtype=torch.float32),
        logits.new_empty((0,) if wanted == AVERAGE else tuple(size), dtype=torch.uint8),
        logits.new_empty(tuple(size) if wanted == CONFIDENCE else (0,), dtype=torch.float32),
    )


def _reference(
    logits: Tensor, tops: Sequence[int], lefts: Sequence[int], tile: Sequence[int], size: Sequence[int], wanted: int
) -> tuple[Tensor, Tensor, Tensor]:
    average = reference.merge_tiles(logits, tops, lefts, tile, size)
    nothing = average.new_empty((0,), dtype=torch.float32)
    if wanted == AVERAGE:
        return average.float(), nothing.byte(), nothing
    classes = average.argmax(0)
    if wanted == CLASSES:
        return nothing, classes.byte(), nothing
    confidence = average.softmax(0).gather(0, classes.unsqueeze(0))[0].float()
    return nothing, classes.byte(), confidence


register(_NAME, "reference", _reference)
register_kernels(_NAME, _forward)
