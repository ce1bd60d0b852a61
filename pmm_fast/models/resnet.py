"""ResNet-18, -50 and -101 with dilated last stages and torchvision's parameter names.

A checkpoint of torchvision's classifier loads by name (:mod:`pmm_fast.models.weights`); ``fc`` has no counterpart.

Shapes: N images of H x W pixels; stage 1 at a quarter, stages 3 and 4 at the output stride.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from pmm_fast.models.batchnorm import BatchNorm2d
from pmm_fast.models.blocks import Stages, initialize_backbone
from pmm_fast.models.conv import Conv2d
from pmm_fast.models.instance_norm import InstanceNormKind, make_instance_norm


class Placement(NamedTuple):
    """Where a block strides and how far its 3x3 convolutions reach."""

    stride: int
    dilation: int
    # the stride sits on the first convolution of the block rather than on its 3x3 one
    stride_first: bool = False


def conv3x3(in_channels: int, out_channels: int, stride: int, dilation: int) -> Conv2d:
    """3x3 convolution without bias whose padding equals its dilation."""
    return Conv2d(in_channels, out_channels, 3, stride, padding=dilation, dilation=dilation, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (ResNet-18).

    Both convolutions of a dilated stage are dilated.  torchvision has no dilated basic block, and the released
    ResNet-18 variant is not dilated at all.  With an instance norm the block ends in that and leaves the ReLU to the
    caller, who may need the map before it.
    """

    expansion = 1

    def __init__(
        self,
        in_channels: int,
        width: int,
        placement: Placement,
        downsample: nn.Module | None,
        instance_norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, width, placement.stride, placement.dilation)
        self.bn1 = BatchNorm2d(width)
        self.conv2 = conv3x3(width, width, 1, placement.dilation)
        self.bn2 = BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.downsample = downsample
        self.instance_norm_layer = instance_norm

    def forward(self, x: Tensor) -> Tensor:
        """``[N, in, h, w]`` to ``[N, width, h / stride, w / stride]``, non-negative without an instance norm."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        shortcut = x if self.downsample is None else self.downsample(x)
        return (self.instance_norm_layer or self.relu)(out + shortcut)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut (ResNet-50, -101).

    The stride is on the 3x3 convolution, as in torchvision, unless ``placement.stride_first``.  With an instance norm
    the block ends in that and leaves the ReLU to the caller, who may need the map before it.
    """

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        width: int,
        placement: Placement,
        downsample: nn.Module | None,
        instance_norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        first, second = (placement.stride, 1) if placement.stride_first else (1, placement.stride)
        self.conv1 = Conv2d(in_channels, width, 1, first, bias=False)
        self.bn1 = BatchNorm2d(width)
        self.conv2 = conv3x3(width, width, second, placement.dilation)
        self.bn2 = BatchNorm2d(width)
        self.conv3 = Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = BatchNorm2d(4 * width)
        self.relu = nn.ReLU()
        self.downsample = downsample
        self.instance_norm_layer = instance_norm

    def forward(self, x: Tensor) -> Tensor:
        """``[N, in, h, w]`` to ``[N, 4 width, h / stride, w / stride]``, non-negative without an instance norm."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        shortcut = x if self.downsample is None else self.downsample(x)
        return (self.instance_norm_layer or self.relu)(out + shortcut)


_BLOCKS: dict[int, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
}


class ResNet(nn.Module):
    """The convolutional part of a ResNet, at output stride 8, 16 or 32.

    A stage that no longer strides dilates every one of its 3x3 convolutions instead: by 2 in stage 4 (output stride
    16), by 2 in stage 3 and 4 in stage 4 (output stride 8).  torchvision's own ``replace_stride_with_dilation`` leaves
    the first block of each stage at the previous dilation; the released code does not.

    Args:
        depth: 18, 50 or 101.
        output_stride: 8, 16 or 32, input pixels a position of stage 4; of stage 3 too, but for 32, where it is 16.
        stride_first: stage 2 strides on the first convolution of its first block (released ``deepv2.py:122-123``).

        instance_norm: ``ibn`` or ``isw``: an instance norm in place of the stem's batch norm, and at the end of the
            last block of stages 1 and 2, between the sum and its ReLU (released ``Resnet.py``).

    Attributes:
        low_level_channels, aux_channels, channels: widths of the three maps returned.
        whitened_channels: widths of the maps handed out to be whitened: stem, stage 1 and stage 2 with ``isw``.
    """

    def __init__(
        self,
        depth: int,
        output_stride: int = 16,
        stride_first: bool = False,
        instance_norm: InstanceNormKind = "none",
    ) -> None:
        super().__init__()
        block, counts = _BLOCKS[depth]
        self.conv1 = Conv2d(3, 64, 7, 2, padding=3, bias=False)
        self.bn1 = BatchNorm2d(64) if instance_norm == "none" else make_instance_norm(instance_norm, 64)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        third = Placement(1, 2) if output_stride == 8 else Placement(2, 1)
        fourth = {8: Placement(1, 4), 16: Placement(1, 2), 32: Placement(2, 1)}[output_stride]
        grown = block.expansion
        self.layer1 = _make_stage(block, 64, 64, counts[0], Placement(1, 1), instance_norm)
        self.layer2 = _make_stage(block, 64 * grown, 128, counts[1], Placement(2, 1, stride_first), instance_norm)
        self.layer3 = _make_stage(block, 128 * grown, 256, counts[2], third)
        self.layer4 = _make_stage(block, 256 * grown, 512, counts[3], fourth)
        self.low_level_channels = 64 * grown
        self.aux_channels = 256 * grown
        self.channels = 512 * grown
        self.whitened_channels = (64, 64 * grown, 128 * grown) if instance_norm == "isw" else ()
        # the last blocks of stages 1 and 2 have left it to be done
        self._rectify = nn.Identity() if instance_norm == "none" else self.relu
        initialize_backbone(self)

    def forward(self, images: Tensor) -> Stages:
        """``[N, 3, H, W]`` to the outputs of stage 1, stage 3 and stage 4, and the maps to be whitened, if any."""
        stem = self.bn1(self.conv1(images))
        first = self.layer1(self.maxpool(self.relu(stem)))
        low_level = self._rectify(first)
        second = self.layer2(low_level)
        aux = self.layer3(self._rectify(second))
        return Stages(low_level, aux, self.layer4(aux), (stem, first, second) if self.whitened_channels else ())


def _make_stage(
    block: type[BasicBlock] | type[Bottleneck],
    in_channels: int,
    width: int,
    count: int,
    placement: Placement,
    instance_norm: InstanceNormKind = "none",
) -> nn.Sequential:
    """``count`` blocks, of which the first may stride and change the width, and the last may have an instance norm."""
    out_channels = width * block.expansion
    downsample = None
    if placement.stride != 1 or in_channels != out_channels:
        downsample = nn.Sequential(
            Conv2d(in_channels, out_channels, 1, placement.stride, bias=False), BatchNorm2d(out_channels)
        )
    blocks = [block(in_channels, width, placement, downsample)]
    rest = Placement(1, placement.dilation)
    blocks += [block(out_channels, width, rest, None) for _ in range(count - 2)]
    norm = None if instance_norm == "none" else make_instance_norm(instance_norm, out_channels)
    return nn.Sequential(*blocks, block(out_channels, width, rest, None, norm))
