"""photometric on the CPU.  Formulas: docs/ops/photometric.md."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pmm_fast.ops.cpu import map_of
from pmm_fast.ops.extension import load


def forward(
    images: Tensor,
    looks: Tensor,
    scale: Sequence[float],
    shift: Sequence[float],
    radius: int,
    contrast: bool,
    out: Tensor,
) -> None:
    """Write ``level * scale - shift`` of each channel to ``out``; ``radius`` is the largest of the looks."""
    batch, _, height, width = images.shape
    # kept until the call is over
    constants = torch.tensor([scale, shift])
    module = load("_C")
    fields = {
        "batch": batch,
        "height": height,
        "width": width,
        "radius": radius,
        "threads": torch.get_num_threads(),
        "images": map_of(images),
        "looks": looks.data_ptr(),
        "scale": constants[0].data_ptr(),
        "shift": constants[1].data_ptr(),
        "out": out.data_ptr(),
    }
    scratch = torch.empty(module.photometric_workspace(**fields), dtype=torch.uint8)
    module.photometric(**fields, workspace=scratch.data_ptr())
