"""Networks of the released code to and from ours, by parameter name.

A released checkpoint is ``{"state_dict": ..., "memory": ..., ...}``; every key of its ``state_dict`` starts with
``module.`` and the memory, ``[K, C]``, stands beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from pmm_fast.models.segmentor import HEADS, Segmentor, build_model, split_architecture
from pmm_fast.models.weights import describe_mismatch

_PREFIX = "module."
_SLOTS = "memory.slots"

# every dataset of the released code is mapped to Cityscapes' train ids
_RELEASED_CLASSES = 19
_RELEASED_LABEL_SPACE = "cityscapes19"

# class weights of the loss, saved by the released code's --cls_wt_loss: not part of the network
_LOSS_WEIGHTS = ("criterion.weight", "criterion_aux.weight")

_BACKBONE = (
    ("layer0.0.", "encoder.backbone.conv1."),
    ("layer0.1.", "encoder.backbone.bn1."),
    ("layer1.", "encoder.backbone.layer1."),
    ("layer2.", "encoder.backbone.layer2."),
    ("layer3.", "encoder.backbone.layer3."),
    ("layer4.", "encoder.backbone.layer4."),
)
_DECODER = (("final1.", "decoder.fuse."), ("final2.0.", "decoder.classify."), ("dsn.", "aux_head."))
_MEMORY = (
    ("memory.output.0.", "memory.fusion.conv."),
    ("memory.output.1.", "memory.fusion.bn."),
    ("memory.writenet.writefeat.0.", "memory.writer.conv."),
    ("memory.writenet.writefeat.1.", "memory.writer.bn."),
    ("memory.clsfier.", "memory.classifier."),
)

# (released prefix, our prefix), in the order of a released state_dict
_PREFIXES = {
    "deeplabv3plus": (
        *_BACKBONE,
        ("aspp.features.", "encoder.aspp.branches."),
        ("aspp.img_conv.", "encoder.aspp.image_pool."),
        ("bot_fine.", "decoder.low_level."),
        ("bot_aspp.", "encoder.project."),
        *_DECODER,
        *_MEMORY,
    ),
    "deeplabv2": (*_BACKBONE, ("aspp.conv2d_list.", "encoder.branches."), *_DECODER, *_MEMORY),
}


def from_released(
    state_dict: Mapping[str, Tensor],
    memory: Tensor | None = None,
    architecture: str = "deeplabv3plus_resnet50",
    *,
    output_stride: int = 16,
) -> Segmentor:
    """A network with the weights of a released checkpoint; classes and channels are read off the shapes.

    Args:
        state_dict: released names, with or without ``module.``; tensors are copied.
        memory: ``[K, C]`` the checkpoint's ``memory``; None for a network without one.
        architecture: ``HEAD_BACKBONE``, with a ResNet backbone.
        output_stride: 8 for the released ``_OS8`` variants, whose parameters are the same.

    Returns:
        The network, on the CPU, in evaluation mode; its label space is ``cityscapes19`` where it has 19 classes.

    Raises:
        ValueError: a parameter that is missing, unexpected or of another shape (all are listed), a memory net without
            its memory or the reverse, or an architecture that has no released names.

    Note:
        The class weights of a loss (``criterion.weight``, ``criterion_aux.weight``) are left out.
    """
    prefixes = _prefixes(architecture)
    released = _strip(state_dict)
    has_memory = any(key.startswith("memory.") for key in released)
    if has_memory and memory is None:
        raise ValueError("from_released: state_dict has a memory net, but memory is None: pass checkpoint['memory']")
    if memory is not None and not has_memory:
        raise ValueError("from_released: memory was given, but state_dict has no memory net (no memory.* key)")
    classifier = released.get("final2.0.weight")
    if classifier is None or classifier.dim() != 4:
        raise ValueError("from_released: no final2.0.weight of shape [K, C, 1, 1]: not a released DeepLab")
    # no storage and no random numbers for weights that are replaced at once
    with torch.device("meta"):
        model = build_model(
            architecture,
            classifier.shape[0],
            channels=classifier.shape[1],
            output_stride=output_stride,
            memory=has_memory,
        )
    wanted = dict(_pairs(model, prefixes))
    given = dict(released) if memory is None else {**released, "memory": memory}
    if mismatch := describe_mismatch(given, {name: tensor for name, (_, tensor) in wanted.items()}):
        raise ValueError(f"from_released: the checkpoint is no {architecture}:\n{mismatch}")
    ours = {key: given[name].detach().to("cpu", tensor.dtype, copy=True) for name, (key, tensor) in wanted.items()}
    model.load_state_dict(ours, assign=True)
    if model.num_classes == _RELEASED_CLASSES:
        model.label_space = _RELEASED_LABEL_SPACE
    return model.eval()


def to_released(model: Segmentor, *, module_prefix: bool = False) -> tuple[dict[str, Tensor], Tensor | None]:
    """The inverse of :func:`from_released`: released names, in the released order, bit for bit.

    Args:
        model: with a ResNet backbone.
        module_prefix: put ``module.`` before every name, as released files have it.

    Returns:
        ``state_dict`` and ``memory`` (``[K, C]``, or None); copies, on the devices of ``model``.

    Raises:
        ValueError: an architecture that has no released names.
    """
    prefix = _PREFIX if module_prefix else ""
    pairs = _pairs(model, _prefixes(model.architecture))
    tensors = {name: tensor.detach().clone() for name, (_, tensor) in pairs}
    memory = tensors.pop("memory", None)
    return {prefix + name: tensor for name, tensor in tensors.items()}, memory


def _prefixes(architecture: str) -> tuple[tuple[str, str], ...]:
    """The name table of an architecture's head."""
    head, backbone = split_architecture(architecture)
    if not backbone.startswith("resnet"):
        known = ", ".join(f"{name}_resnet50" for name in HEADS)
        raise ValueError(f"{architecture} has no counterpart among released checkpoints; ResNets have, such as {known}")
    return _PREFIXES[head]


def _strip(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without ``module.``, loss weights left out."""
    if "state_dict" in state_dict:
        raise ValueError(
            "from_released: this is a whole checkpoint; pass checkpoint['state_dict'] and checkpoint.get('memory')"
        )
    names = {key.removeprefix(_PREFIX): value for key, value in state_dict.items()}
    return {key: value for key, value in names.items() if key not in _LOSS_WEIGHTS}


def _pairs(model: Segmentor, prefixes: tuple[tuple[str, str], ...]) -> Iterator[tuple[str, tuple[str, Tensor]]]:
    """``released name, (our name, tensor)`` of every tensor of a network, the memory last under ``memory``."""
    tensors = model.state_dict()
    for theirs, ours in prefixes:
        for key, tensor in tensors.items():
            if key.startswith(ours):
                yield theirs + key.removeprefix(ours), (key, tensor)
    if _SLOTS in tensors:
        yield "memory", (_SLOTS, tensors[_SLOTS])
