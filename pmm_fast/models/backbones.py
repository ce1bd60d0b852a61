"""The backbones by name, for the networks of :mod:`pmm_fast.models.segmentor`."""

from __future__ import annotations

from pmm_fast.models.instance_norm import INSTANCE_NORMS, InstanceNormKind
from pmm_fast.models.mobilenetv2 import MobileNetV2
from pmm_fast.models.resnet import ResNet
from pmm_fast.models.shufflenetv2 import ShuffleNetV2
from pmm_fast.models.timm_backbone import PREFIX, TimmBackbone

BACKBONES = ("resnet18", "resnet50", "resnet101", "mobilenet_v2", "mobilenet_v2_released", "shufflenet_v2")

Backbone = ResNet | MobileNetV2 | ShuffleNetV2 | TimmBackbone
"""``images [N, 3, H, W]`` to :class:`pmm_fast.models.blocks.Stages`, with the widths of its maps as attributes."""


def build_backbone(
    name: str, output_stride: int, stride_first: bool, instance_norm: InstanceNormKind = "none"
) -> Backbone:
    """A backbone with random weights.

    Args:
        name: one of ``BACKBONES``, of which ``mobilenet_v2_released`` is the variant of the released code; or
            ``timm/NAME``, a network of timm.
        output_stride: 8, 16 or 32.
        stride_first: of a ResNet's second stage, see :class:`pmm_fast.models.resnet.ResNet`.
        instance_norm: ``none``, ``ibn`` or ``isw``, see :mod:`pmm_fast.models.instance_norm`.

    Raises:
        ValueError: an unknown instance norm, or one in a backbone that has no place for it; a network of timm that
            cannot be a backbone.
        ImportError: ``timm/NAME`` without timm.
    """
    if instance_norm not in INSTANCE_NORMS:
        raise ValueError(f"build_model: instance_norm must be {', '.join(INSTANCE_NORMS)}, got {instance_norm!r}")
    if name == "shufflenet_v2" or name.startswith(PREFIX):
        if instance_norm != "none":
            raise ValueError(
                f"build_model: instance_norm {instance_norm!r} needs a ResNet or MobileNetV2 backbone, got {name}"
            )
        if name.startswith(PREFIX):
            return TimmBackbone(name.removeprefix(PREFIX), output_stride)
        return ShuffleNetV2(output_stride)
    if name.startswith("mobilenet_v2"):
        return MobileNetV2(output_stride, released=name.endswith("_released"), instance_norm=instance_norm)
    return ResNet(int(name.removeprefix("resnet")), output_stride, stride_first, instance_norm)
