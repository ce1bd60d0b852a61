"""ShuffleNetV2 with torchvision's parameter names, dilated as the released code does.

A checkpoint of torchvision's classifier loads by name (:mod:`pmm_fast.models.weights`); ``fc`` has no counterpart.
Ma et al., ECCV 2018; released code: ``network/Shufflenet.py`` and ``network/deepv3plus.py``.

Shapes: N images of H x W pixels; the low-level map at an eighth, the last two at the output stride.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pmm_fast.models.batchnorm import BatchNorm2d
from pmm_fast.models.blocks import Stages, conv_bn_relu, initialize_backbone
from pmm_fast.models.conv import Conv2d

_STEM = 24
# (width, blocks) of stages 2 to 4 at width 1, each of which halves the map: Ma et al., table 5
_STAGES = ((116, 4), (232, 8), (464, 4))
_LAST = 1024


def depthwise(channels: int, stride: int, dilation: int) -> Conv2d:
    """3x3 convolution of each channel by itself, whose padding equals its dilation."""
    return Conv2d(channels, channels, 3, stride, dilation, dilation, groups=channels, bias=False)


class ShuffleUnit(nn.Module):
    """Two branches side by side, their channels shuffled.

    Without ``downsample`` the first half of the channels is kept as it is and the second goes through ``branch2``; with
    it both branches see all channels and one may stride, or be dilated in its stead.

    Args:
        in_channels, out_channels: widths; equal without ``downsample``.
        downsample: whether the first branch has layers too.
        stride, dilation: of the 3x3 convolution of each branch.
    """

    def __init__(
        self, in_channels: int, out_channels: int, downsample: bool = False, stride: int = 1, dilation: int = 1
    ) -> None:
        super().__init__()
        half = out_channels // 2
        self.downsample = downsample
        self.branch1 = nn.Sequential()
        if downsample:
            strided = depthwise(in_channels, stride, dilation)
            self.branch1 = nn.Sequential(strided, BatchNorm2d(in_channels), *conv_bn_relu(in_channels, half))
        self.branch2 = nn.Sequential(
            *conv_bn_relu(in_channels if downsample else half, half),
            depthwise(half, stride, dilation),
            BatchNorm2d(half),
            *conv_bn_relu(half, half),
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[N, in, h, w]`` to ``[N, out, h / stride, w / stride]``."""
        first, second = (x, x) if self.downsample else x.chunk(2, 1)
        halves = torch.stack([self.branch1(first), self.branch2(second)], 2)
        # channel 2 i + j of the result is channel i of branch j
        return halves.flatten(1, 2)


class ShuffleNetV2(nn.Module):
    """The convolutional part of ShuffleNetV2 (width 1), at output stride 8, 16 or 32.

    Where a stage no longer strides, the convolutions that did are dilated instead, by 2 in the first such stage and by
    4 in the next; those behind them are not (released ``deepv3plus.py``, trunk ``shufflenetv2``).

    Args:
        output_stride: 8, 16 or 32, input pixels a position of the last map.

    Attributes:
        low_level_channels, aux_channels, channels: widths of the three maps returned (116, 464, 1024).
        whitened_channels: none; there is no variant with instance norms here.
    """

    low_level_channels = 116
    aux_channels = 464
    channels = _LAST
    whitened_channels: tuple[int, ...] = ()

    def __init__(self, output_stride: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(Conv2d(3, _STEM, 3, 2, padding=1, bias=False), BatchNorm2d(_STEM), nn.ReLU())
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        in_channels, reached, dilation = _STEM, 4, 1
        stages = []
        for width, count in _STAGES:
            stride = 2 if reached < output_stride else 1
            reached *= stride
            dilation *= 2 // stride
            units = [ShuffleUnit(in_channels, width, True, stride, dilation)]
            units += [ShuffleUnit(width, width) for _ in range(count - 1)]
            stages.append(nn.Sequential(*units))
            in_channels = width
        self.stage2, self.stage3, self.stage4 = stages
        self.conv5 = conv_bn_relu(in_channels, _LAST)
        initialize_backbone(self)

    def forward(self, images: Tensor) -> Stages:
        """``[N, 3, H, W]`` to the outputs of stages 2 and 4 and of the last convolution."""
        low_level = self.stage2(self.maxpool(self.conv1(images)))
        aux = self.stage4(self.stage3(low_level))
        return Stages(low_level, aux, self.conv5(aux))
