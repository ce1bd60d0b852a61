"""DeepLabV3+: atrous spatial pyramid pooling and a decoder with a low-level branch.

Released code: ``network/deepv3plus.py``; Chen et al., ECCV 2018.

Shapes: N images, C feature channels, c low-level channels, K classes, h x w feature positions, h4 x w4 low-level
positions (a quarter of the image's; an eighth with the released MobileNetV2 and with ShuffleNetV2).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pmm_fast.models.backbones import Backbone
from pmm_fast.models.blocks import (
    Features,
    WhitenedFeatures,
    conv_bn_relu,
    gather_features,
    initialize_head,
    upsample,
)
from pmm_fast.models.conv import Conv2d

_RATES = (6, 12, 18)
_LOW_LEVEL_CHANNELS = 48


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: the image mean, a 1x1 and three dilated 3x3 convolutions, side by side.

    Args:
        in_channels: width of the backbone's last map.
        channels: C, width of each of the five branches.
        output_stride: 16 for dilations 6, 12, 18; 8 doubles and 32 halves them.
    """

    def __init__(self, in_channels: int, channels: int, output_stride: int) -> None:
        super().__init__()
        rates = [rate * 16 // output_stride for rate in _RATES]
        self.branches = nn.ModuleList([conv_bn_relu(in_channels, channels)])
        self.branches.extend(conv_bn_relu(in_channels, channels, 3, rate) for rate in rates)
        self.image_pool = conv_bn_relu(in_channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, in, h, w]`` to ``[N, 5 C, h, w]``: image mean, 1x1, then the dilated ones in rising order.

        Raises:
            ValueError: one image while training, whose mean BatchNorm cannot normalise.
        """
        norm = self.image_pool[1]
        # over several ranks, the others have values too
        if x.shape[0] == 1 and norm.training and getattr(norm, "group", None) is None:
            raise ValueError(
                "ASPP: training needs at least 2 images a forward pass, got 1: the image-pooling branch has one "
                "position an image, and BatchNorm needs two values; raise the batch size or call .eval()"
            )
        pooled = self.image_pool(x.mean((2, 3), keepdim=True))
        # resampling a 1 x 1 map is repeating it
        pooled = pooled.expand(-1, -1, x.shape[2], x.shape[3])
        return torch.cat([pooled, *(branch(x) for branch in self.branches)], 1)


class DeepLabV3PlusEncoder(nn.Module):
    """Backbone, ASPP and the projection to C channels: everything that produces the feature map.

    Args:
        backbone: returns :class:`pmm_fast.models.blocks.Stages`.
        channels: C.
        output_stride: of the backbone.
    """

    def __init__(self, backbone: Backbone, channels: int, output_stride: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.aspp = ASPP(backbone.channels, channels, output_stride)
        self.project = conv_bn_relu(5 * channels, channels)
        initialize_head(self.aspp)
        initialize_head(self.project)

    def forward(self, images: Tensor) -> Features | WhitenedFeatures:
        """``[N, 3, H, W]`` to the feature ``[N, C, h, w]``, the low-level map and the auxiliary map."""
        stages = self.backbone(images)
        return gather_features(self.project(self.aspp(stages.last)), stages.low_level, stages)


class DeepLabV3PlusDecoder(nn.Module):
    """Joins the (read) feature with 48 low-level channels and classifies at the low-level resolution.

    Args:
        low_level_channels: c.
        channels: C.
        num_classes: K.
    """

    def __init__(self, low_level_channels: int, channels: int, num_classes: int) -> None:
        super().__init__()
        self.low_level = conv_bn_relu(low_level_channels, _LOW_LEVEL_CHANNELS)
        first = conv_bn_relu(_LOW_LEVEL_CHANNELS + channels, channels, 3)
        self.fuse = nn.Sequential(*first, *conv_bn_relu(channels, channels, 3))
        self.classify = Conv2d(channels, num_classes, 1)
        initialize_head(self)

    def forward(self, feature: Tensor, low_level: Tensor) -> Tensor:
        """``[N, C, h, w]`` and ``[N, c, h4, w4]`` to logits ``[N, K, h4, w4]``."""
        fine = self.low_level(low_level)
        # in mixed precision CUDA's autocast upsamples in float32, and the map that is joined would become float32 too
        coarse = upsample(feature, (fine.shape[2], fine.shape[3])).to(fine.dtype)
        return self.classify(self.fuse(torch.cat([fine, coarse], 1)))
