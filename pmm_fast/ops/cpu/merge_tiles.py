"""merge_tiles on the CPU.  Formulas: docs/ops/merge_tiles.md."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pmm_fast.ops.cpu import common, map_of, matrix_of
from pmm_fast.ops.extension import load


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
    module = load("_C")
    fields = common(logits, None) | {
        "classes": logits.shape[1],
        "tile_height": tile[0],
        "tile_width": tile[1],
        "image_height": size[0],
        "image_width": size[1],
        "logits": map_of(logits),
        "tops": places[0].data_ptr(),
        "lefts": places[1].data_ptr(),
        "average": matrix_of(average),
        "labels": matrix_of(classes),
        "confidence": matrix_of(confidence),
    }
    scratch = torch.empty(module.merge_workspace(**fields), dtype=torch.uint8)
    module.merge_tiles(**fields, workspace=scratch.data_ptr())
