"""Instance normalisation in the early stages of a backbone: IBN-Net and the maps that RobustNet whitens.

Pan et al., ECCV 2018 (IBN-Net, variant b); Choi et al., CVPR 2021 (RobustNet).  Released code: ``network/Resnet.py``
and ``network/Mobilenet.py``, ``--wt_layer 0 0 4 4 4 0 0`` (``ibn``) and ``0 0 2 2 2 0 0`` (``isw``).

Shapes: N images, C channels, H x W positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# it registers the op
import pmm_fast.models.batchnorm  # noqa: F401
from pmm_fast.ops import compute_dtype

InstanceNormKind = Literal["none", "ibn", "isw"]
"""``none``; ``ibn``: with weight and bias; ``isw``: without, and the normalised maps are handed out to be whitened."""
INSTANCE_NORMS: tuple[str, ...] = get_args(InstanceNormKind)


class InstanceNorm2d(nn.InstanceNorm2d):
    """``nn.InstanceNorm2d`` without running statistics, with the derivatives of :mod:`pmm_fast.models.batchnorm`.

    y = w (x - mu) / sqrt(v + eps) + b with mean mu and variance v (a mean over H W) of each channel of each image: the
    batch normalisation of one image of N C channels.

    Args:
        num_features: C.
        affine: whether there are w and b; else they are 1 and 0.

    Note:
        Differentiable twice.  Without gradient mode no registered op is called, so that inference can be exported.
    """

    def __init__(self, num_features: int, affine: bool) -> None:
        super().__init__(num_features, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` to the same shape and dtype, the same while training and after it.

        Raises:
            ValueError: maps of one position, which have no variance.
        """
        if x.shape[2] * x.shape[3] == 1:
            raise ValueError(f"InstanceNorm2d: needs maps of two positions or more, got input size {tuple(x.shape)}")
        if not torch.is_grad_enabled():
            return F.instance_norm(x, weight=self.weight, bias=self.bias, eps=self.eps)
        images, channels = x.shape[:2]
        like = {"dtype": compute_dtype(x.dtype), "device": x.device}
        weight = torch.ones(channels, **like) if self.weight is None else self.weight
        bias = torch.zeros(channels, **like) if self.bias is None else self.bias
        side_by_side = x.reshape(1, images * channels, *x.shape[2:])
        y = torch.ops.pmm_fast.batch_norm(side_by_side, weight.repeat(images), bias.repeat(images), self.eps, None)[0]
        return y.view(x.shape)


def make_instance_norm(kind: InstanceNormKind, channels: int) -> InstanceNorm2d:
    """The layer that stands in a backbone for ``ibn`` or ``isw``."""
    return InstanceNorm2d(channels, affine=kind == "ibn")


class WhiteningMasks(nn.Module):
    """Which covariances of the whitened maps count in the whitening loss (:mod:`pmm_fast.meta.whitening`).

    Buffers ``mask0``, ``mask1``, ...: bool ``[C, C]``, one for each map, False until somebody selects.

    Args:
        channels: C of each map.
    """

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        for index, width in enumerate(channels):
            self.register_buffer(f"mask{index}", torch.zeros(width, width, dtype=torch.bool))
