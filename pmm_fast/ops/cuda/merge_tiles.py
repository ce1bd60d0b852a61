"""merge_tiles on CUDA; logits of any strides.  Formulas: docs/ops/merge_tiles.md."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pmm_fast.ops import cuda


def forward(
    logits: Tensor,
    places: Tensor,
    tile: Sequence[int],
    size: Sequence[int],
    average: Tensor,
    classes: Tensor,
    confidence: Tensor,
) -> None:
    """Write those of the results that have elements; ``places [2, T]`` are tops and lefts."""
    module = cuda.module()
    call = module.Merge()
    call.type = cuda.type_of(logits)
    call.tiles, call.classes, call.height, call.width = logits.shape
    call.tile_height, call.tile_width = tile
    call.image_height, call.image_width = size
    call.logits, call.strides = logits.data_ptr(), logits.stride()
    call.tops, call.lefts = places[0].data_ptr(), places[1].data_ptr()
    call.average, call.labels, call.confidence = average.data_ptr(), classes.data_ptr(), confidence.data_ptr()
    with cuda.launching(logits):
        call.stream = cuda.current_stream(logits)
        module.merge_tiles(call)
