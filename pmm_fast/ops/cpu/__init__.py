"""The C++ kernels of ``csrc/cpu`` on tensors: addresses in, results allocated here, scratch memory too.

Any strides are taken as they are.  float32 and float64 features are computed in their own type, bf16 in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pmm_fast.ops.checks import check_label_values, is_seed
from pmm_fast.ops.extension import load

_TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}
_LABEL_TYPES = {torch.uint8: 0, torch.int16: 1, torch.int32: 2, torch.int64: 3}


def map_of(tensor: Tensor | None) -> tuple[int, ...] | None:
    """Address and strides of ``[B, channels, h, w]``; nothing of a gradient that is not wanted."""
    return None if tensor is None or tensor.dim() != 4 else (tensor.data_ptr(), *tensor.stride())


def matrix_of(tensor: Tensor | None) -> int | None:
    """Address of a contiguous tensor; nothing of a gradient that is not wanted."""
    return None if tensor is None or tensor.numel() == 0 else tensor.data_ptr()


def readable_labels(labels: Tensor) -> Tensor:
    """Contiguous, of a type that the kernels read."""
    if labels.dtype not in _LABEL_TYPES:
        labels = labels.to(torch.int16 if labels.dtype == torch.int8 else torch.int64)
    return labels.contiguous()


def common(features: Tensor, labels: Tensor | None) -> dict[str, Any]:
    """The fields that every kernel takes."""
    batch, _, height, width = features.shape
    fields = {
        "type": _TYPES[features.dtype],
        "batch": batch,
        "height": height,
        "width": width,
        "threads": torch.get_num_threads(),
    }
    if labels is not None:
        fields |= {
            "label_type": _LABEL_TYPES[labels.dtype],
            "label_height": labels.shape[1],
            "label_width": labels.shape[2],
            "labels": labels.data_ptr(),
        }
    return fields


def run(
    operator: str, kernel: str, workspace: str, labels: Tensor | None, classes: int, ignore: int, fields: dict[str, Any]
) -> None:
    """Call a kernel with scratch memory that PyTorch allocates, and turn a bad label into an error."""
    module = load("_C")
    scratch = torch.empty(getattr(module, workspace)(**fields), dtype=torch.uint8)
    if not getattr(module, kernel)(**fields, workspace=scratch.data_ptr()):
        assert labels is not None
        check_label_values(operator, labels, classes, ignore)


def run_pass(
    operator: str,
    order: int,
    features: Tensor,
    labels: Tensor | None,
    classes: int,
    depth: int,
    ignore_index: int = 255,
    maps: dict[str, Tensor | None] | None = None,
    matrices: dict[str, Tensor | None] | None = None,
    **options: Any,
) -> None:
    """``memory_pass`` of csrc/cpu: ``maps`` and ``matrices`` are named as in args.h; each is an input or a result."""
    fields = common(features, labels) | options
    fields |= {"order": order, "channels": features.shape[1], "classes": classes, "depth": depth}
    fields |= {"ignore_index": ignore_index, "features": map_of(features)}
    # inputs made contiguous must outlive the call
    kept = {name: None if tensor is None else tensor.contiguous() for name, tensor in (matrices or {}).items()}
    fields |= {name: map_of(tensor) for name, tensor in (maps or {}).items()}
    fields |= {name: matrix_of(tensor) for name, tensor in kept.items()}
    run(operator, "memory_pass", "pass_workspace", labels, classes, ignore_index, fields)


def noise_fields(noise: Tensor | None) -> tuple[dict[str, Tensor | None], dict[str, Tensor | None]]:
    """Noise as a map or, a seed, as a matrix."""
    if is_seed(noise):
        return {}, {"seed": noise}
    return {"noise": noise}, {}
