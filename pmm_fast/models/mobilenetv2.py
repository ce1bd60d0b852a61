"""MobileNetV2 with dilated last stages and torchvision's parameter names.

A checkpoint of torchvision's classifier loads by name (:mod:`pmm_fast.models.weights`); ``classifier`` has no
counterpart, nor has the last 1x1 convolution (``features.18``) outside of the released variant: there the segmentation
head takes the 320 channels before it.

Shapes: N images of H x W pixels; the low-level map at a quarter (released: an eighth), the last two at the output
stride.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from pmm_fast.models.batchnorm import BatchNorm2d
from pmm_fast.models.blocks import Stages, initialize_backbone
from pmm_fast.models.conv import Conv2d
from pmm_fast.models.instance_norm import InstanceNormKind, make_instance_norm

# (expansion, width, blocks, stride) of each stage: Sandler et al., CVPR 2018, table 2
_STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))

_LAST = 1280


class Taps(NamedTuple):
    """Which maps are handed out, in the numbering of ``features``, and their widths and that of the last."""

    low_level: int
    aux: int
    widths: tuple[int, int, int]


# last blocks of the 24- and the 96-channel stage
_TAPS = Taps(3, 13, (24, 96, 320))
# released ``network/deepv3plus.py``, trunk mobilenetv2: last blocks of the 32- and the 320-channel stage
_RELEASED_TAPS = Taps(6, 17, (32, 320, _LAST))
# last blocks of the 16-, the 32- and the 64-channel stage: the ends of the released layers 0, 1 and 2
_NORMALISED = (1, 6, 10)


def conv_bn_relu6(
    in_channels: int, out_channels: int, kernel: int = 1, stride: int = 1, dilation: int = 1, depthwise: bool = False
) -> nn.Sequential:
    """Convolution without bias, BatchNorm, ReLU6, as children 0, 1, 2."""
    padding = dilation * (kernel // 2)
    groups = in_channels if depthwise else 1
    conv = Conv2d(in_channels, out_channels, kernel, stride, padding, dilation, groups, bias=False)
    return nn.Sequential(conv, BatchNorm2d(out_channels), nn.ReLU6())


class InvertedResidual(nn.Module):
    """Widen (1x1), filter each channel (3x3), narrow (1x1, linear); a shortcut where the shape stays.

    With an instance norm the block ends in that.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        expansion: int,
        stride: int,
        dilation: int,
        instance_norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        hidden = in_channels * expansion
        layers: list[nn.Module] = []
        if expansion != 1:
            layers.append(conv_bn_relu6(in_channels, hidden))
        layers.append(conv_bn_relu6(hidden, hidden, 3, stride, dilation, depthwise=True))
        layers += [Conv2d(hidden, out_channels, 1, bias=False), BatchNorm2d(out_channels)]
        self.conv = nn.Sequential(*layers)
        self.has_shortcut = stride == 1 and in_channels == out_channels
        self.instance_norm_layer = instance_norm

    def forward(self, x: Tensor) -> Tensor:
        """``[N, in, h, w]`` to ``[N, out, h / stride, w / stride]``."""
        out = x + self.conv(x) if self.has_shortcut else self.conv(x)
        return out if self.instance_norm_layer is None else self.instance_norm_layer(out)


class MobileNetV2(nn.Module):
    """The convolutional part of MobileNetV2 (width 1), at output stride 8, 16 or 32.

    Dilation follows the law of :class:`pmm_fast.models.resnet.ResNet`: where a stage no longer strides, it and those
    behind it dilate every 3x3 convolution twice as far.  The released variant dilates only the convolutions that no
    longer stride, hands out other maps, and ends in the 1x1 convolution to 1280 channels.

    Args:
        output_stride: 8, 16 or 32, input pixels a position of the last map.
        released: the variant of the released code, trunk ``mobilenetv2`` of ``network/deepv3plus.py``.
        instance_norm: ``ibn`` or ``isw``: an instance norm at the end of the last block of 16, of 32 and of 64
            channels, after its shortcut (released ``Mobilenet.py``).

    Attributes:
        low_level_channels, aux_channels, channels: widths of the three maps returned (24, 96, 320; released 32, 320,
            1280).
        whitened_channels: widths of the maps handed out to be whitened: those normalised with ``isw``.
    """

    def __init__(
        self, output_stride: int = 16, released: bool = False, instance_norm: InstanceNormKind = "none"
    ) -> None:
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
                kept_back = index == 0 and stride < stage_stride
                block_dilation = dilation if kept_back or not released else 1
                normalised = instance_norm != "none" and len(layers) in _NORMALISED
                norm = make_instance_norm(instance_norm, width) if normalised else None
                layers.append(InvertedResidual(in_channels, width, expansion, block_stride, block_dilation, norm))
                in_channels = width
        if released:
            layers.append(conv_bn_relu6(in_channels, _LAST))
        self.features = nn.Sequential(*layers)
        self._taps = _RELEASED_TAPS if released else _TAPS
        self.low_level_channels, self.aux_channels, self.channels = self._taps.widths
        self.whitened_channels = (16, 32, 64) if instance_norm == "isw" else ()
        initialize_backbone(self)

    def forward(self, images: Tensor) -> Stages:
        """``[N, 3, H, W]`` to the maps of ``low_level_channels``, ``aux_channels`` and ``channels``."""
        x = low_level = aux = images
        normalised: list[Tensor] = []
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index == self._taps.low_level:
                low_level = x
            elif index == self._taps.aux:
                aux = x
            if self.whitened_channels and index in _NORMALISED:
                normalised.append(x)
        return Stages(low_level, aux, x, tuple(normalised))
