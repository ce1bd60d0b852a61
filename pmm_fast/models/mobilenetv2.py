"""MobileNetV2 with dilated last stages and torchvision's parameter names.

A checkpoint of torchvision's classifier loads by name (:mod:`pmm_fast.models.weights`); its last 1x1 convolution
(``features.18``) and ``classifier`` have no counterpart: the segmentation head takes the 320 channels before them.

Shapes: N images of H x W pixels; the low-level map at a quarter, the last two at the output stride.
"""

from __future__ import annotations

from torch import Tensor, nn

from pmm_fast.models.batchnorm import BatchNorm2d
from pmm_fast.models.blocks import Stages, initialize_backbone
from pmm_fast.models.conv import Conv2d

# (expansion, width, blocks, stride) of each stage: Sandler et al., CVPR 2018, table 2
_STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))

# last blocks of the 24- and the 96-channel stage, in the numbering of ``features``
_LOW_LEVEL, _AUX = 3, 13


def conv_bn_relu6(
    in_channels: int, out_channels: int, kernel: int = 1, stride: int = 1, dilation: int = 1, depthwise: bool = False
) -> nn.Sequential:
    """Convolution without bias, BatchNorm, ReLU6, as children 0, 1, 2."""
    padding = dilation * (kernel // 2)
    groups = in_channels if depthwise else 1
    conv = Conv2d(in_channels, out_channels, kernel, stride, padding, dilation, groups, bias=False)
    return nn.Sequential(conv, BatchNorm2d(out_channels), nn.ReLU6())


class InvertedResidual(nn.Module):
    """Widen (1x1), filter each channel (3x3), narrow (1x1, linear); a shortcut where the shape stays."""

    def __init__(self, in_channels: int, out_channels: int, expansion: int, stride: int, dilation: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        layers: list[nn.Module] = []
        if expansion != 1:
            layers.append(conv_bn_relu6(in_channels, hidden))
        layers.append(conv_bn_relu6(hidden, hidden, 3, stride, dilation, depthwise=True))
        layers += [Conv2d(hidden, out_channels, 1, bias=False), BatchNorm2d(out_channels)]
        self.conv = nn.Sequential(*layers)
        self.has_shortcut = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        """``[N, in, h, w]`` to ``[N, out, h / stride, w / stride]``."""
        return x + self.conv(x) if self.has_shortcut else self.conv(x)


class MobileNetV2(nn.Module):
    """The convolutional part of MobileNetV2 (width 1), at output stride 8 or 16.

    Dilation follows the law of :class:`pmm_fast.models.resnet.ResNet`: where a stage no longer strides, it and those
    behind it dilate every 3x3 convolution twice as far.

    Args:
        output_stride: 8 or 16, input pixels a position of the last map.

    Attributes:
        low_level_channels, aux_channels, channels: widths of the three maps returned (24, 96, 320).
    """

    low_level_channels = 24
    aux_channels = 96
    channels = 320

    def __init__(self, output_stride: int = 16) -> None:
        super().__init__()
        layers: list[nn.Module] = [conv_bn_relu6(3, 32, 3, stride=2)]
        in_channels, reached, dilation = 32, 2, 1
        for expansion, width, count, stage_stride in _STAGES:
            stride = stage_stride
            if reached * stride > output_stride:
                dilation, stride = dilation * stride, 1
            reached *= stride
            for index in range(count):
                block_stride = stride if index == 0 else 1
                layers.append(InvertedResidual(in_channels, width, expansion, block_stride, dilation))
                in_channels = width
        self.features = nn.Sequential(*layers)
        initialize_backbone(self)

    def forward(self, images: Tensor) -> Stages:
        """``[N, 3, H, W]`` to the last maps of 24, 96 and 320 channels."""
        x = low_level = aux = images
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index == _LOW_LEVEL:
                low_level = x
            elif index == _AUX:
                aux = x
        return Stages(low_level, aux, x)
