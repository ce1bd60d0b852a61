"""Pieces that every network here is made of: what an encoder returns, conv + BN + ReLU, upsampling, initialisation.

Shapes: N images, C feature channels, c low-level channels, c3 auxiliary channels, K classes, H x W image pixels,
h x w feature positions, h4 x w4 low-level positions (a quarter of the image's).
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from pmm_fast.models.batchnorm import BatchNorm2d
from pmm_fast.models.conv import Conv2d


class Features(NamedTuple):
    """What an encoder returns.

    Attributes:
        feature: ``[N, C, h, w]``, non-negative: what the memory reads and is written from.
        low_level: ``[N, c, h4, w4]``, the finest map the decoder uses; heads without a low-level branch give
            ``feature`` itself here, so that the tuple always holds three tensors.
        aux: ``[N, c3, h, w]``, input of the auxiliary head.
    """

    feature: Tensor
    low_level: Tensor
    aux: Tensor


class WhitenedFeatures(NamedTuple):
    """:class:`Features` of an encoder whose backbone hands out maps to be whitened (``Stages.whitened``)."""

    feature: Tensor
    low_level: Tensor
    aux: Tensor
    whitened: tuple[Tensor, ...]


class Stages(NamedTuple):
    """What a backbone returns: ``low_level`` at a quarter of the image, ``aux`` and ``last`` at the output stride.

    ``whitened``: the instance-normalised maps of a backbone whose covariances are trained (``isw``), else none.
    """

    low_level: Tensor
    aux: Tensor
    last: Tensor
    whitened: tuple[Tensor, ...] = ()


def gather_features(feature: Tensor, low_level: Tensor, stages: Stages) -> Features | WhitenedFeatures:
    """What an encoder returns, from its own map, the finest one for its decoder and what its backbone returned."""
    if stages.whitened:
        return WhitenedFeatures(feature, low_level, stages.aux, stages.whitened)
    return Features(feature, low_level, stages.aux)


def conv_bn_relu(in_channels: int, out_channels: int, kernel: int = 1, dilation: int = 1) -> nn.Sequential:
    """Convolution without bias that keeps the size, BatchNorm, ReLU, as children 0, 1, 2."""
    padding = dilation * (kernel // 2)
    return nn.Sequential(
        Conv2d(in_channels, out_channels, kernel, padding=padding, dilation=dilation, bias=False),
        BatchNorm2d(out_channels),
        nn.ReLU(),
    )


def upsample(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resampling of ``[N, C, h, w]`` to ``size`` with aligned corners, as everywhere in the released code."""
    return F.interpolate(x, size, mode="bilinear", align_corners=True)


def initialize_head(module: nn.Module) -> None:
    """Kaiming-normal convolutions (fan in), zero biases, BatchNorm at 1 and 0 (released code, ``network/mynn.py``)."""
    for child in module.modules():
        if isinstance(child, nn.Conv2d):
            nn.init.kaiming_normal_(child.weight, nonlinearity="relu")
            if child.bias is not None:
                nn.init.zeros_(child.bias)
        elif isinstance(child, nn.BatchNorm2d):
            nn.init.ones_(child.weight)
            nn.init.zeros_(child.bias)


def initialize_backbone(module: nn.Module) -> None:
    """Kaiming-normal convolutions (fan out), as torchvision starts its classifiers."""
    for child in module.modules():
        if isinstance(child, nn.Conv2d):
            nn.init.kaiming_normal_(child.weight, mode="fan_out", nonlinearity="relu")


class AuxHead(nn.Sequential):
    """The auxiliary classifier on the last but one stage.

    3x3 convolution (with bias) to ``2 channels``, BatchNorm, ReLU, Dropout2d, 1x1 convolution; children 0 to 4, the
    released ``dsn`` (``network/deepv3plus.py:dsn``).

    Args:
        in_channels: c3, the width of the stage.
        channels: C, the width of the network's feature map.
        num_classes: K.
        dropout: probability that a channel is dropped while training.

    Attributes:
        dropped_channels: 2 C, the channels that the dropout chooses from.
    """

    def __init__(self, in_channels: int, channels: int, num_classes: int, dropout: float) -> None:
        super().__init__(
            Conv2d(in_channels, 2 * channels, 3, padding=1),
            BatchNorm2d(2 * channels),
            nn.ReLU(),
            nn.Dropout2d(dropout),
            Conv2d(2 * channels, num_classes, 1),
        )
        self.dropped_channels = 2 * channels
        initialize_head(self)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """Logits.

        Args:
            x: ``[N, c3, h, w]``.
            keep: ``[N, 2 C]`` what the channels are multiplied by instead of a random dropout: 0 or 1 / (1 - p).

        Returns:
            ``[N, K, h, w]``.
        """
        x = self[2](self[1](self[0](x)))
        x = self[3](x) if keep is None else x * keep.to(x.dtype)[:, :, None, None]
        return self[4](x)
