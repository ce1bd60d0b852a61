"""DeepLabV2: four dilated 3x3 convolutions, summed, and a decoder without a low-level branch, at output stride 8.

Released code: ``network/deepv2.py`` (which puts BatchNorm and ReLU on each branch; Chen et al., TPAMI 2018, do not).

Shapes: N images, C feature channels, K classes, h x w feature positions.
"""

from __future__ import annotations

from torch import Tensor, nn

from pmm_fast.models.backbones import Backbone
from pmm_fast.models.blocks import Features, WhitenedFeatures, conv_bn_relu, gather_features, initialize_head
from pmm_fast.models.conv import Conv2d

_RATES = (6, 12, 18, 24)


class DeepLabV2Encoder(nn.Module):
    """Backbone and the sum of four dilated branches: everything that produces the feature map.

    Args:
        backbone: at output stride 8, returns :class:`pmm_fast.models.blocks.Stages`.
        channels: C.
    """

    def __init__(self, backbone: Backbone, channels: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.branches = nn.ModuleList(conv_bn_relu(backbone.channels, channels, 3, rate) for rate in _RATES)
        initialize_head(self.branches)

    def forward(self, images: Tensor) -> Features | WhitenedFeatures:
        """``[N, 3, H, W]`` to the feature ``[N, C, h, w]``, the same again (no low level) and the auxiliary map."""
        stages = self.backbone(images)
        feature = self.branches[0](stages.last)
        for branch in self.branches[1:]:
            feature = feature + branch(stages.last)
        return gather_features(feature, feature, stages)


class DeepLabV2Decoder(nn.Module):
    """One 3x3 convolution and the classifier, at the resolution of the feature map.

    Args:
        channels: C.
        num_classes: K.
    """

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.fuse = conv_bn_relu(channels, channels, 3)
        self.classify = Conv2d(channels, num_classes, 1)
        initialize_head(self)

    def forward(self, feature: Tensor, low_level: Tensor) -> Tensor:
        """``[N, C, h, w]`` to logits ``[N, K, h, w]``; ``low_level`` is there for the common signature, not used."""
        return self.classify(self.fuse(feature))
