"""Networks of the released code to and from ours, by parameter name.

A released checkpoint is ``{"state_dict": ..., "memory": ..., ...}``; every key of its ``state_dict`` starts with
``module.`` and the memory, ``[K, C]``, stands beside it (released code ``train.py``, ``optimizer.py:45-89``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from pmm_fast.models.instance_norm import InstanceNormKind
from pmm_fast.models.segmentor import Segmentor, build_model, split_architecture
from pmm_fast.models.weights import describe_mismatch

_PREFIX = "module."
_SLOTS = "memory.slots"
_MASKS = "whitening."

# every dataset of the released code is mapped to Cityscapes' train ids
_RELEASED_CLASSES = 19
_RELEASED_LABEL_SPACE = "cityscapes19"

# class weights of the loss, saved by the released code's --cls_wt_loss: not part of the network
_LOSS_WEIGHTS = ("criterion.weight", "criterion_aux.weight")

# (released prefix, our prefix of the backbone), in the order of a released state_dict
_RESNET = (
    ("layer0.0.", "conv1."),
    ("layer0.1.", "bn1."),
    *((f"layer{stage}.", f"layer{stage}.") for stage in (1, 2, 3, 4)),
)
# first block of each released layer, in the numbering of ``features``
_MOBILENET_LAYERS = ((0, range(2)), (1, range(2, 7)), (2, range(7, 11)), (3, range(11, 18)), (4, range(18, 19)))
_TRUNKS = {
    "resnet18": _RESNET,
    "resnet50": _RESNET,
    "resnet101": _RESNET,
    "mobilenet_v2_released": tuple(
        (f"layer{layer}.{position}.", f"features.{index}.")
        for layer, indices in _MOBILENET_LAYERS
        for position, index in enumerate(indices)
    ),
    "shufflenet_v2": (
        ("layer0.layer.0.", "conv1."),
        ("layer1.", "stage2."),
        ("layer2.", "stage3."),
        ("layer3.", "stage4."),
        ("layer4.layer.", "conv5."),
    ),
}
_RESNET_BLOCKS = {(2, 2, 2, 2): "resnet18", (3, 4, 6, 3): "resnet50", (3, 4, 23, 3): "resnet101"}

_ENCODERS = {
    "deeplabv3plus": (
        ("aspp.features.", "encoder.aspp.branches."),
        ("aspp.img_conv.", "encoder.aspp.image_pool."),
        ("bot_fine.", "decoder.low_level."),
        ("bot_aspp.", "encoder.project."),
    ),
    "deeplabv2": (("aspp.conv2d_list.", "encoder.branches."),),
}
_REST = (
    ("final1.", "decoder.fuse."),
    ("final2.0.", "decoder.classify."),
    ("dsn.", "aux_head."),
    ("memory.output.0.", "memory.fusion.conv."),
    ("memory.output.1.", "memory.fusion.bn."),
    ("memory.writenet.writefeat.0.", "memory.writer.conv."),
    ("memory.writenet.writefeat.1.", "memory.writer.bn."),
    ("memory.clsfier.", "memory.classifier."),
)


def from_released(
    state_dict: Mapping[str, Tensor],
    memory: Tensor | None = None,
    architecture: str | None = None,
    *,
    output_stride: int | None = None,
    instance_norm: InstanceNormKind | None = None,
) -> Segmentor:
    """A network with the weights of a released checkpoint; classes and channels are read off the shapes.

    Args:
        state_dict: released names, with or without ``module.``; tensors are copied.
        memory: ``[K, C]`` the checkpoint's ``memory``; None for a network without one.
        architecture: ``HEAD_BACKBONE``; None: recognised by the names.
        output_stride: 8, 16 or 32, which no name tells; None: that of the released function of this architecture
            (32 for ResNet-18, 8 for DeepLabV2, else 16; the ``_OS8`` and ``_OS32`` functions have others).
        instance_norm: as in :func:`pmm_fast.models.build_model`; None: recognised by the names, but for a MobileNetV2,
            whose names with ``isw`` are those with ``none``, which is then taken.

    Returns:
        The network, on the CPU, in evaluation mode; its label space is ``cityscapes19`` where it has 19 classes.

    Raises:
        ValueError: a parameter that is missing, unexpected or of another shape (all are listed), one that is not
            finite, a memory net without its memory or the reverse, or an architecture that is not recognised or has no
            released names.

    Note:
        The class weights of a loss (``criterion.weight``, ``criterion_aux.weight``) are left out.
    """
    released = _strip(state_dict)
    _check_memory(released, memory)
    num_classes, channels = _sizes(released, memory)
    architecture = architecture or recognise(released)
    prefixes = _prefixes(architecture)
    # no storage and no random numbers for weights that are replaced at once
    with torch.device("meta"):
        model = build_model(
            architecture,
            num_classes,
            channels=channels,
            output_stride=output_stride or released_output_stride(architecture),
            memory=memory is not None,
            instance_norm=instance_norm or _recognise_instance_norm(architecture, released),
        )
    wanted = dict(_pairs(model, prefixes))
    given = dict(released) if memory is None else {**released, "memory": memory}
    if mismatch := describe_mismatch(given, {name: tensor for name, (_, tensor) in wanted.items()}):
        raise ValueError(f"from_released: the checkpoint is no {architecture}:\n{mismatch}")
    check_finite(given)
    ours = {key: given[name].detach().to("cpu", tensor.dtype, copy=True) for name, (key, tensor) in wanted.items()}
    # the released code keeps no masks either: what is to be whitened is selected anew
    ours |= {key: torch.zeros_like(x, device="cpu") for key, x in model.state_dict().items() if key.startswith(_MASKS)}
    model.load_state_dict(ours, assign=True)
    if model.num_classes == _RELEASED_CLASSES:
        model.label_space = _RELEASED_LABEL_SPACE
    return model.eval()


def to_released(model: Segmentor, *, module_prefix: bool = False) -> tuple[dict[str, Tensor], Tensor | None]:
    """The inverse of :func:`from_released`: released names, in the released order, bit for bit.

    Args:
        model: of an architecture that the released code has.
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


def from_released_checkpoint(
    checkpoint: object,
    architecture: str | None = None,
    *,
    output_stride: int | None = None,
    instance_norm: InstanceNormKind | None = None,
) -> tuple[Segmentor, list[str]]:
    """The network of a whole released checkpoint, and what else the file holds.

    Args:
        checkpoint: what ``torch.load`` returned: ``state_dict``, ``memory`` where there is one, and more.
        architecture, output_stride, instance_norm: as in :func:`from_released`.

    Returns:
        The network, and a line for each entry that is not used: ``epoch (40)``, ``optimizer``,
        ``state_dict: criterion.weight``.

    Raises:
        ValueError: something else than such a checkpoint (with what it looks like), or a cause of
            :func:`from_released`.
    """
    if not is_released(checkpoint):
        raise ValueError(f"no checkpoint of the released code: this is {looks_like(checkpoint)}")
    assert isinstance(checkpoint, Mapping)
    state_dict, memory = checkpoint["state_dict"], checkpoint.get("memory")
    if memory is not None and not isinstance(memory, Tensor):
        raise ValueError(f"memory: expected a tensor [K, C], got {_summary(memory)}")
    if memory is None and any(key.removeprefix(_PREFIX).startswith("memory.") for key in state_dict):
        raise ValueError("the network reads a memory (memory.* in state_dict), but the checkpoint has no key memory")
    model = from_released(state_dict, memory, architecture, output_stride=output_stride, instance_norm=instance_norm)
    unused = [_summary_of_entry(key, checkpoint[key]) for key in checkpoint if key not in ("state_dict", "memory")]
    unused += [f"state_dict: {key}" for key in state_dict if key.removeprefix(_PREFIX) in _LOSS_WEIGHTS]
    return model, unused


def to_released_checkpoint(model: Segmentor) -> dict[str, Any]:
    """A whole released checkpoint, as the released ``eval.py --snapshot`` reads it.

    Args:
        model: of an architecture that the released code has.

    Returns:
        ``state_dict`` (every name with ``module.``), ``memory`` where the network has one, ``epoch`` and ``mean_iu``
        (both 0; the released code asks for them); copies, on the devices of ``model``.

    Raises:
        ValueError: an architecture that has no released names.
    """
    state_dict, memory = to_released(model, module_prefix=True)
    return {
        "state_dict": state_dict,
        **({} if memory is None else {"memory": memory}),
        "epoch": 0,
        "mean_iu": 0,
    }


def not_in_released(model: Segmentor) -> list[str]:
    """What the released form has no place for and its reader takes for granted, where this network differs."""
    settings, usual = model.settings, released_output_stride(model.architecture)
    differing = []
    if model.label_space not in (None, _RELEASED_LABEL_SPACE):
        differing.append(f"label space {model.label_space}")
    if settings["output_stride"] != usual:
        differing.append(f"output stride {settings['output_stride']} (taken to be {usual})")
    if model.memory is not None and settings["temperature"] != 1:
        differing.append(f"temperature {settings['temperature']} of the read (taken to be 1)")
    if model.whitening is not None:
        differing.append("the masks of the whitening loss")
    return differing


def recognise(names: Collection[str]) -> str:
    """The architecture that released names belong to: the head by its pyramid, the trunk by its first layer and blocks.

    Args:
        names: keys of a released ``state_dict``, without ``module.``.

    Raises:
        ValueError: no network of the released code that runs has such names.
    """
    if any(name.startswith("aspp.conv2d_list.") for name in names):
        head = "deeplabv2"
    elif any(name.startswith("aspp.features.") for name in names):
        head = "deeplabv3plus"
    else:
        raise ValueError("from_released: neither aspp.features.* nor aspp.conv2d_list.*: not a released DeepLab")
    if "layer0.layer.0.0.weight" in names:
        return f"{head}_shufflenet_v2"
    if "layer0.0.0.weight" in names:
        return f"{head}_mobilenet_v2_released"
    blocks = tuple(
        len({name.split(".")[1] for name in names if name.startswith(f"layer{stage}.")}) for stage in (1, 2, 3, 4)
    )
    if blocks not in _RESNET_BLOCKS:
        known = "; ".join(f"{', '.join(map(str, counts))} ({name})" for counts, name in _RESNET_BLOCKS.items())
        raise ValueError(f"from_released: stages of {', '.join(map(str, blocks))} blocks: expected {known}")
    return f"{head}_{_RESNET_BLOCKS[blocks]}"


def _recognise_instance_norm(architecture: str, names: Collection[str]) -> InstanceNormKind:
    """A ResNet's stem has a batch norm, an instance norm with weight and bias (ibn), or one without any (isw)."""
    if "_resnet" in architecture:
        if "layer0.1.running_mean" in names:
            return "none"
        return "ibn" if "layer0.1.weight" in names else "isw"
    return "ibn" if any(name.endswith(".instance_norm_layer.weight") for name in names) else "none"


def released_output_stride(architecture: str) -> int:
    """The output stride of the released function of an architecture; where there are several, of the plain name."""
    head, backbone = split_architecture(architecture)
    if head == "deeplabv2":
        return 8
    return 32 if backbone == "resnet18" else 16


def is_released(content: object) -> bool:
    """Whether a loaded file is a checkpoint of the released code, as far as its keys tell."""
    return isinstance(content, Mapping) and _has_released_names(content.get("state_dict"))


def looks_like(content: object) -> str:
    """What a loaded file holds, in a few words, for an error that says it is something else than was expected."""
    if is_released(content):
        return "a checkpoint of the released code"
    if not isinstance(content, Mapping):
        return _summary(content)
    if "state_dict" in content:
        return f"a checkpoint of another network, whose state_dict is {looks_like(content['state_dict'])}"
    if _has_released_names(content):
        return "the bare state_dict of a released checkpoint: put it under the key state_dict, its memory under memory"
    names = list(content)
    first = ", ".join(map(str, names[:3])) + (", ..." if len(names) > 3 else "")
    if not names or not all(isinstance(value, Tensor) for value in content.values()):
        return f"a dictionary with the keys {first}" if names else "an empty dictionary"
    for name in ("fc.weight", "classifier.weight", "classifier.1.weight", "classifier.6.weight", "head.weight"):
        if name in content and content[name].dim() == 2:
            shape = list(content[name].shape)
            return f"weights of an image classifier ({name} {shape}): a backbone, for --model.weights of a training"
    return f"weights of another network ({first})"


def check_finite(state: Mapping[str, Tensor]) -> None:
    """Refuse weights with a NaN or an infinity, of which a network makes NaN everywhere.

    Raises:
        ValueError: naming them.
    """
    if wrong := [name for name, value in state.items() if value.is_floating_point() and not value.isfinite().all()]:
        raise ValueError(f"values that are not finite in {', '.join(wrong)}")


def _sizes(released: Mapping[str, Tensor], memory: Tensor | None) -> tuple[int, int]:
    """Classes and channels, each as most of the tensors have it that show it, so that the odd one out is named."""
    tensors = dict(released) if memory is None else {**released, "memory": memory}

    def most(*shown: tuple[str, int]) -> int:
        found = [tensors[name].shape[axis] for name, axis in shown if name in tensors and tensors[name].dim() > axis]
        if not found:
            names = ", ".join(name for name, _ in shown)
            raise ValueError(f"from_released: none of {names}: not a released DeepLab")
        return Counter(found).most_common(1)[0][0]

    classes = most(("final2.0.weight", 0), ("final2.0.bias", 0), ("dsn.4.weight", 0), ("memory", 0))
    return classes, most(("final2.0.weight", 1), ("final1.0.weight", 0), ("final1.1.weight", 0), ("memory", 1))


def _check_memory(released: Mapping[str, Tensor], memory: Tensor | None) -> None:
    has_memory = any(key.startswith("memory.") for key in released)
    if has_memory and memory is None:
        raise ValueError("from_released: state_dict has a memory net, but memory is None: pass checkpoint['memory']")
    if memory is not None and not has_memory:
        raise ValueError("from_released: memory was given, but state_dict has no memory net (no memory.* key)")


def _has_released_names(state_dict: object) -> bool:
    if not isinstance(state_dict, Mapping):
        return False
    names = {str(key).removeprefix(_PREFIX) for key in state_dict}
    # not a certain one: what is missing is to be told
    return all(any(name.startswith(part) for name in names) for part in ("layer0.", "layer4.", "aspp."))


def _summary(value: object) -> str:
    return f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _summary_of_entry(key: object, value: object) -> str:
    return f"{key} ({value})" if isinstance(value, int | float | str) else str(key)


def _prefixes(architecture: str) -> tuple[tuple[str, str], ...]:
    """The name table of an architecture: (released prefix, our prefix), in the order of a released state_dict."""
    head, backbone = split_architecture(architecture)
    if backbone not in _TRUNKS:
        raise ValueError(
            f"{architecture} has no counterpart among released checkpoints; these backbones have: {', '.join(_TRUNKS)}"
        )
    trunk = tuple((theirs, f"encoder.backbone.{ours}") for theirs, ours in _TRUNKS[backbone])
    return trunk + _ENCODERS[head] + _REST


def _strip(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without ``module.``, loss weights left out."""
    if "state_dict" in state_dict:
        raise ValueError(
            "from_released: this is a whole checkpoint; pass checkpoint['state_dict'] and checkpoint.get('memory'), or "
            "give it to from_released_checkpoint"
        )
    if others := [f"{key} ({_summary(value)})" for key, value in state_dict.items() if not isinstance(value, Tensor)]:
        raise ValueError(f"from_released: expected tensors, got {', '.join(others)}")
    names = {key.removeprefix(_PREFIX): value for key, value in state_dict.items()}
    if len(names) < len(state_dict):
        twice = sorted(name for name in names if name in state_dict and _PREFIX + name in state_dict)
        raise ValueError(f"from_released: given twice, with {_PREFIX!r} and without: {', '.join(twice)}")
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
