"""photometric on CUDA.  Formulas: docs/ops/photometric.md."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pmm_fast.ops import cuda


def forward(
    images: Tensor,
    looks: Tensor,
    scale: Sequence[float],
    shift: Sequence[float],
    radius: int,
    contrast: bool,
    out: Tensor,
) -> None:
    """Write ``level * scale - shift`` of each channel to ``out``.

    No look's blur has more than ``radius``, and none has contrast unless ``contrast`` says that one may.
    """
    module = cuda.module()
    call = module.Photometric()
    call.batch, _, call.height, call.width = images.shape
    call.strides = images.stride()
    call.scale, call.shift = scale, shift
    call.radius, call.contrast = radius, contrast
    call.images, call.looks, call.out = images.data_ptr(), looks.data_ptr(), out.data_ptr()
    with cuda.launching(images):
        workspace = torch.empty(module.photometric_workspace(call), dtype=torch.uint8, device=images.device)
        call.workspace = workspace.data_ptr()
        call.stream = cuda.current_stream(images)
        module.photometric(call)
