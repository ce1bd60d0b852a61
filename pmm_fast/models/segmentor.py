"""The whole network: encoder, memory, decoder and auxiliary head, and the function that builds it by name.

Shapes: N images, C feature channels, K classes, H x W image pixels, h x w feature positions.
"""

from __future__ import annotations

import difflib
from typing import Any, NamedTuple

from torch import Tensor, nn

from pmm_fast.models.backbones import BACKBONES, build_backbone
from pmm_fast.models.blocks import AuxHead, upsample
from pmm_fast.models.deeplabv2 import DeepLabV2Decoder, DeepLabV2Encoder
from pmm_fast.models.deeplabv3plus import DeepLabV3PlusDecoder, DeepLabV3PlusEncoder
from pmm_fast.models.instance_norm import InstanceNormKind, WhiteningMasks
from pmm_fast.models.memory import SemanticMemory
from pmm_fast.models.timm_backbone import PREFIX

HEADS = ("deeplabv3plus", "deeplabv2")
OUTPUT_STRIDES = (8, 16, 32)
ARCHITECTURES = tuple(f"{head}_{backbone}" for head in HEADS for backbone in BACKBONES)


class Output(NamedTuple):
    """What the network predicts.

    Attributes:
        logits: ``[N, K, H, W]``, at the size of the images.
        feature: ``[N, C, h, w]``, before the memory was read.
        read_feature: ``[N, C, h, w]``, what the decoder saw; ``feature`` itself without a memory.
        assignment: ``[N, K, h, w]``, weights of the slots at each position; None without a memory.
    """

    logits: Tensor
    feature: Tensor
    read_feature: Tensor
    assignment: Tensor | None


class Segmentor(nn.Module):
    """Encoder, memory, decoder and auxiliary head; built by :func:`build_model`.

    The sub-modules share no state, so that each can be called by itself with other parameters
    (``torch.func.functional_call``), as the meta-learning step does.

    Args:
        encoder: ``images [N, 3, H, W]`` to :class:`pmm_fast.models.blocks.Features`.
        decoder: ``feature, low_level`` to logits at its own resolution (not that of the image).
        aux_head: :class:`pmm_fast.models.blocks.AuxHead`, ``Features.aux`` to logits ``[N, K, h, w]``.
        memory: or None for the plain baseline.
        settings: the arguments of :func:`build_model` that rebuild this network.
        whitening: which covariances of the backbone's instance-normalised maps are trained away; None without them.

    Attributes:
        label_space: name of the classes that the network was trained for; None until somebody says so.
    """

    label_space: str | None = None

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        aux_head: AuxHead,
        memory: SemanticMemory | None,
        settings: dict[str, Any],
        whitening: WhiteningMasks | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.aux_head = aux_head
        self.memory = memory
        self.whitening = whitening
        self._settings = dict(settings)

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments of :func:`build_model`: ``build_model(**model.settings)`` has the same parameters' shapes."""
        return dict(self._settings)

    @property
    def architecture(self) -> str:
        """``HEAD_BACKBONE``."""
        return self._settings["architecture"]

    @property
    def num_classes(self) -> int:
        """K."""
        return self._settings["num_classes"]

    def feature_size(self, height: int, width: int) -> tuple[int, int]:
        """Size h, w of the feature map of images of a size in pixels: every stride rounds up."""
        stride = self._settings["output_stride"]
        return -(-height // stride), -(-width // stride)

    def forward(self, images: Tensor, noise: Tensor | None = None) -> Output:
        """Segments images with the memory as it stands (it is only read).

        Args:
            images: ``[N, 3, H, W]`` floating point, normalised by ImageNet's mean and deviation.
            noise: ``[N, K, h, w]`` Gumbel noise on the read, or its seed (int64, one element), or None.

        Returns:
            Logits at image size, the features and the assignment.

        Raises:
            ValueError: images of another shape, or noise for a network without a memory.
        """
        coarse = self.predict_coarse(images, noise)
        return coarse._replace(logits=upsample(coarse.logits, (images.shape[2], images.shape[3])))

    def predict_coarse(self, images: Tensor, noise: Tensor | None = None) -> Output:
        """:meth:`forward` with the logits at the decoder's own resolution, before they are upsampled to the images."""
        if images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"Segmentor: images must be [N, 3, H, W], got shape {tuple(images.shape)}")
        features = self.encoder(images)
        read_feature, assignment = features.feature, None
        if self.memory is not None:
            read_feature, _, assignment = self.memory(features.feature, noise)
        elif noise is not None:
            raise ValueError("Segmentor: noise was given, but this network has no memory to read")
        return Output(self.decoder(read_feature, features.low_level), features.feature, read_feature, assignment)


def build_model(
    architecture: str,
    num_classes: int,
    *,
    channels: int = 256,
    output_stride: int = 16,
    memory: bool = True,
    aux_dropout: float = 0.1,
    temperature: float = 1.0,
    instance_norm: InstanceNormKind = "none",
) -> Segmentor:
    """A network with random weights; :func:`pmm_fast.models.load_backbone` gives it a trained backbone.

    Args:
        architecture: ``HEAD_BACKBONE``, one of ``ARCHITECTURES``, or ``HEAD_timm/NAME`` with a network of timm.
        num_classes: K, classes and memory slots.
        channels: C, width of the feature map, the memory and both heads; 256 as published.
        output_stride: 8, 16 or 32; ``deeplabv2`` is 8 whatever is asked.
        memory: whether the network has a memory.
        aux_dropout: probability that the auxiliary head drops a channel while training.
        temperature: of the softmax with which the memory is read.
        instance_norm: ``none``, ``ibn`` (IBN-Net) or ``isw`` (RobustNet): :mod:`pmm_fast.models.instance_norm`.

    Returns:
        The network, in training mode, its memory slots zero.

    Raises:
        ValueError: an unknown architecture, a size that is not positive, another output stride, a dropout outside
            [0, 1), an unknown instance norm or one that the backbone has no place for.
    """
    head, backbone_name = split_architecture(architecture)
    _check_sizes(num_classes, channels, output_stride, aux_dropout)
    if head == "deeplabv2":
        output_stride = 8
    backbone = build_backbone(backbone_name, output_stride, head == "deeplabv2", instance_norm)
    encoder: nn.Module
    decoder: nn.Module
    if head == "deeplabv2":
        encoder = DeepLabV2Encoder(backbone, channels)
        decoder = DeepLabV2Decoder(channels, num_classes)
    else:
        encoder = DeepLabV3PlusEncoder(backbone, channels, output_stride)
        decoder = DeepLabV3PlusDecoder(backbone.low_level_channels, channels, num_classes)
    settings = {
        "architecture": architecture,
        "num_classes": num_classes,
        "channels": channels,
        "output_stride": output_stride,
        "memory": memory,
        "aux_dropout": aux_dropout,
        "temperature": temperature,
        "instance_norm": instance_norm,
    }
    aux_head = AuxHead(backbone.aux_channels, channels, num_classes, aux_dropout)
    slots = SemanticMemory(num_classes, channels, temperature) if memory else None
    whitening = WhiteningMasks(backbone.whitened_channels) if instance_norm == "isw" else None
    return Segmentor(encoder, decoder, aux_head, slots, settings, whitening)


def split_architecture(architecture: str) -> tuple[str, str]:
    """``HEAD_BACKBONE`` to its two parts; whether timm has a ``timm/NAME`` is not looked at.

    Raises:
        ValueError: a name that is neither one of ``ARCHITECTURES``, with the nearest ones, nor ``HEAD_timm/NAME``.
    """
    head, _, backbone = architecture.partition("_")
    if architecture not in ARCHITECTURES and not (head in HEADS and backbone.startswith(PREFIX)):
        near = difflib.get_close_matches(architecture, ARCHITECTURES, n=2)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(
            f"unknown architecture {architecture!r}.{hint} Known: {', '.join(ARCHITECTURES)}, HEAD_{PREFIX}NAME"
        )
    return head, backbone


def _check_sizes(num_classes: int, channels: int, output_stride: int, aux_dropout: float) -> None:
    for name, value in (("num_classes", num_classes), ("channels", channels)):
        if value < 1:
            raise ValueError(f"build_model: {name} must be positive, got {value}")
    if output_stride not in OUTPUT_STRIDES:
        raise ValueError(f"build_model: output_stride must be 8, 16 or 32, got {output_stride}")
    if not 0 <= aux_dropout < 1:
        raise ValueError(f"build_model: aux_dropout must be in [0, 1), got {aux_dropout}")
