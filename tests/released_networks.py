"""The released networks again, in plain functions of a released state_dict: names, strides and dilations by hand.

Nothing of the package is used, so that what it builds can be compared with it.  Strides and dilations are those of the
released ``network/deepv3plus.py`` (variants D, D16 and D32), ``Mobilenet.py`` and ``Shufflenet.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.released import released_keys

Shapes = dict[str, list[int]]

# features.1 to features.17 of MobileNetV2: (channels in, out, expansion, stride)
MOBILE_BLOCKS = (
    (32, 16, 1, 1),
    (16, 24, 6, 2),
    (24, 24, 6, 1),
    (24, 32, 6, 2),
    (32, 32, 6, 1),
    (32, 32, 6, 1),
    (32, 64, 6, 2),
    (64, 64, 6, 1),
    (64, 64, 6, 1),
    (64, 64, 6, 1),
    (64, 96, 6, 1),
    (96, 96, 6, 1),
    (96, 96, 6, 1),
    (96, 160, 6, 2),
    (160, 160, 6, 1),
    (160, 160, 6, 1),
    (160, 320, 6, 1),
)
# released layers 0 to 4 as first and last of ``features``
MOBILE_LAYERS = ((0, 1), (2, 6), (7, 10), (11, 17), (18, 18))
SHUFFLE_STAGES = ((24, 116, 4), (116, 232, 8), (232, 464, 4))
WIDTHS = {"resnet18": (64, 256, 512), "mobilenet_v2_released": (32, 320, 1280), "shufflenet_v2": (116, 464, 1024)}
"""Channels of the low-level, the auxiliary and the last map."""


class Maps(NamedTuple):
    """What a released network computes, before the memory."""

    low_level: Tensor
    aux: Tensor
    last: Tensor
    feature: Tensor
    logits: Tensor
    aux_logits: Tensor


# --- names and shapes ---------------------------------------------------------------------------------------------


def network_keys(trunk: str) -> Shapes:
    """Every name of DeepLabV3+ with memory on a trunk, with its shape, in the released order."""
    low_level, aux, last = WIDTHS[trunk]
    keys = {"resnet18": _resnet18_keys, "mobilenet_v2_released": _mobile_keys, "shufflenet_v2": _shuffle_keys}[trunk]()
    for name, shape in released_keys("deeplabv3plus_resnet50").items():
        if name.startswith("layer"):
            continue
        widths = {"aspp.": (2048, last), "bot_fine.": (256, low_level), "dsn.": (1024, aux)}
        for start, (old, new) in widths.items():
            if name.startswith(start) and len(shape) == 4 and shape[1] == old:
                shape = [shape[0], new, *shape[2:]]
        keys[name] = shape
    return keys


def _norm(name: str, channels: int) -> Shapes:
    tensors = ("weight", "bias", "running_mean", "running_var")
    return {**{f"{name}.{tensor}": [channels] for tensor in tensors}, f"{name}.num_batches_tracked": []}


def _conv(conv: str, norm: str, out: int, inside: int, kernel: int = 1) -> Shapes:
    return {f"{conv}.weight": [out, inside, kernel, kernel], **_norm(norm, out)}


def _resnet18_keys() -> Shapes:
    keys = _conv("layer0.0", "layer0.1", 64, 3, 7)
    inside = 64
    for stage, width in enumerate((64, 128, 256, 512), 1):
        for block in (0, 1):
            name = f"layer{stage}.{block}"
            keys |= _conv(f"{name}.conv1", f"{name}.bn1", width, inside, 3)
            keys |= _conv(f"{name}.conv2", f"{name}.bn2", width, width, 3)
            if inside != width:
                keys |= _conv(f"{name}.downsample.0", f"{name}.downsample.1", width, inside)
            inside = width
    return keys


def _mobile_name(index: int) -> str:
    layer = next(layer for layer, (first, last) in enumerate(MOBILE_LAYERS) if first <= index <= last)
    return f"layer{layer}.{index - MOBILE_LAYERS[layer][0]}"


def _mobile_keys() -> Shapes:
    keys = _conv("layer0.0.0", "layer0.0.1", 32, 3, 3)
    for index, (inside, out, expansion, _) in enumerate(MOBILE_BLOCKS, 1):
        name, hidden = f"{_mobile_name(index)}.conv", inside * expansion
        first = 0
        if expansion > 1:
            keys |= _conv(f"{name}.0.0", f"{name}.0.1", hidden, inside)
            first = 1
        keys |= _conv(f"{name}.{first}.0", f"{name}.{first}.1", hidden, 1, 3)
        keys |= _conv(f"{name}.{first + 1}", f"{name}.{first + 2}", out, hidden)
    return keys | _conv("layer4.0.0", "layer4.0.1", 1280, 320)


def _shuffle_keys() -> Shapes:
    keys = _conv("layer0.layer.0.0", "layer0.layer.0.1", 24, 3, 3)
    for stage, (inside, width, count) in enumerate(SHUFFLE_STAGES, 1):
        half = width // 2
        for unit in range(count):
            name = f"layer{stage}.{unit}"
            if unit == 0:
                keys |= _conv(f"{name}.branch1.0", f"{name}.branch1.1", inside, 1, 3)
                keys |= _conv(f"{name}.branch1.2", f"{name}.branch1.3", half, inside)
            keys |= _conv(f"{name}.branch2.0", f"{name}.branch2.1", half, inside if unit == 0 else half)
            keys |= _conv(f"{name}.branch2.3", f"{name}.branch2.4", half, 1, 3)
            keys |= _conv(f"{name}.branch2.5", f"{name}.branch2.6", half, half)
    return keys | _conv("layer4.layer.0", "layer4.layer.1", 1024, 464)


# --- values -------------------------------------------------------------------------------------------------------


def network_forward(trunk: str, state: Mapping[str, Tensor], images: Tensor, output_stride: int) -> Maps:
    """DeepLabV3+ without its memory, in evaluation mode."""
    trunks = {"mobilenet_v2_released": _mobile_maps, "shufflenet_v2": _shuffle_maps}
    low_level, aux, last = trunks.get(trunk, _resnet_maps)(state, images, output_stride)
    rates = {8: (12, 24, 36), 16: (6, 12, 18), 32: (3, 6, 9)}[output_stride]
    pooled = _cbr(state, last.mean((2, 3), keepdim=True), "aspp.img_conv.0", "aspp.img_conv.1")
    branches = [pooled.expand(-1, -1, *last.shape[2:]), _cbr(state, last, "aspp.features.0.0", "aspp.features.0.1")]
    for index, rate in enumerate(rates, 1):
        name = f"aspp.features.{index}"
        branches.append(_cbr(state, last, f"{name}.0", f"{name}.1", padding=rate, dilation=rate))
    feature = _cbr(state, torch.cat(branches, 1), "bot_aspp.0", "bot_aspp.1")
    fine = _cbr(state, low_level, "bot_fine.0", "bot_fine.1")
    x = torch.cat([fine, _resize(feature, fine)], 1)
    x = _cbr(state, x, "final1.0", "final1.1", padding=1)
    x = _cbr(state, x, "final1.3", "final1.4", padding=1)
    logits = _resize(F.conv2d(x, state["final2.0.weight"], state["final2.0.bias"]), images)
    hidden = F.conv2d(aux, state["dsn.0.weight"], state["dsn.0.bias"], padding=1)
    aux_logits = F.conv2d(_bn(state, hidden, "dsn.1").relu(), state["dsn.4.weight"], state["dsn.4.bias"])
    return Maps(low_level, aux, last, feature, logits, aux_logits)


def _resize(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=True)


def _bn(state: Mapping[str, Tensor], x: Tensor, name: str) -> Tensor:
    mean, var, weight, bias = (state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
    return F.batch_norm(x, mean, var, weight, bias)


def _cb(
    state: Mapping[str, Tensor], x: Tensor, conv: str, norm: str, stride: int = 1, padding: int = 0, dilation: int = 1
) -> Tensor:
    weight = state[f"{conv}.weight"]
    return _bn(state, F.conv2d(x, weight, None, stride, padding, dilation, x.shape[1] // weight.shape[1]), norm)


def _cbr(state: Mapping[str, Tensor], x: Tensor, conv: str, norm: str, **how: int) -> Tensor:
    return _cb(state, x, conv, norm, **how).relu()


def _resnet_maps(state: Mapping[str, Tensor], images: Tensor, output_stride: int) -> tuple[Tensor, Tensor, Tensor]:
    """ResNet-18 and -50; every 3x3 ``conv2`` of a stage that does not stride is dilated, ``conv1`` never."""
    x = F.max_pool2d(_cbr(state, images, "layer0.0", "layer0.1", stride=2, padding=3), 3, 2, 1)
    dilations = {8: (0, 0, 2, 4), 16: (0, 0, 0, 2), 32: (0, 0, 0, 0)}[output_stride]
    maps = []
    for stage, dilation in enumerate(dilations, 1):
        block = 0
        while f"layer{stage}.{block}.conv1.weight" in state:
            name = f"layer{stage}.{block}"
            stride = 2 if block == 0 and stage > 1 and not dilation else 1
            shortcut = x
            if f"{name}.downsample.0.weight" in state:
                shortcut = _cb(state, x, f"{name}.downsample.0", f"{name}.downsample.1", stride)
            if f"{name}.conv3.weight" in state:
                x = _cbr(state, x, f"{name}.conv1", f"{name}.bn1")
                how = {"stride": stride, "padding": dilation or 1, "dilation": dilation or 1}
                x = _cbr(state, x, f"{name}.conv2", f"{name}.bn2", **how)
                x = _cb(state, x, f"{name}.conv3", f"{name}.bn3")
            else:
                assert not dilation
                x = _cbr(state, x, f"{name}.conv1", f"{name}.bn1", stride=stride, padding=1)
                x = _cb(state, x, f"{name}.conv2", f"{name}.bn2", padding=1)
            x = (x + shortcut).relu()
            block += 1
        maps.append(x)
    return maps[0], maps[2], maps[3]


def _mobile_maps(state: Mapping[str, Tensor], images: Tensor, output_stride: int) -> tuple[Tensor, Tensor, Tensor]:
    """MobileNetV2; only the convolutions that would stride are dilated."""
    dilated = {8: {7: 2, 14: 4}, 16: {14: 2}, 32: {}}[output_stride]
    x = F.relu6(_cb(state, images, "layer0.0.0", "layer0.0.1", stride=2, padding=1))
    maps = {}
    for index, (inside, out, expansion, block_stride) in enumerate(MOBILE_BLOCKS, 1):
        name, before, first = f"{_mobile_name(index)}.conv", x, int(expansion > 1)
        dilation = dilated.get(index, 1)
        stride = 1 if index in dilated else block_stride
        if expansion > 1:
            x = F.relu6(_cb(state, x, f"{name}.0.0", f"{name}.0.1"))
        how = {"stride": stride, "padding": dilation, "dilation": dilation}
        x = F.relu6(_cb(state, x, f"{name}.{first}.0", f"{name}.{first}.1", **how))
        x = _cb(state, x, f"{name}.{first + 1}", f"{name}.{first + 2}")
        # the released block adds by the stride it was made with, which a dilated one had too
        if block_stride == 1 and inside == out:
            x = before + x
        maps[index] = x
    return maps[6], maps[17], F.relu6(_cb(state, x, "layer4.0.0", "layer4.0.1"))


def _shuffle_maps(state: Mapping[str, Tensor], images: Tensor, output_stride: int) -> tuple[Tensor, Tensor, Tensor]:
    """ShuffleNetV2; only the convolutions that would stride are dilated."""
    dilated = {8: {2: 2, 3: 4}, 16: {3: 2}, 32: {}}[output_stride]
    x = F.max_pool2d(_cbr(state, images, "layer0.layer.0.0", "layer0.layer.0.1", stride=2, padding=1), 3, 2, 1)
    maps = []
    for stage, (_, width, count) in enumerate(SHUFFLE_STAGES, 1):
        for unit in range(count):
            name, dilation = f"layer{stage}.{unit}", dilated.get(stage, 1) if unit == 0 else 1
            how = {"stride": 2 if unit == 0 and stage not in dilated else 1, "padding": dilation, "dilation": dilation}
            if unit == 0:
                kept = _cb(state, x, f"{name}.branch1.0", f"{name}.branch1.1", **how)
                kept, changed = _cbr(state, kept, f"{name}.branch1.2", f"{name}.branch1.3"), x
            else:
                kept, changed = x[:, : width // 2], x[:, width // 2 :]
            changed = _cbr(state, changed, f"{name}.branch2.0", f"{name}.branch2.1")
            changed = _cb(state, changed, f"{name}.branch2.3", f"{name}.branch2.4", **how)
            changed = _cbr(state, changed, f"{name}.branch2.5", f"{name}.branch2.6")
            # alternating: kept 0, changed 0, kept 1, ...
            x = torch.empty(x.shape[0], width, *changed.shape[2:])
            x[:, 0::2], x[:, 1::2] = kept, changed
        maps.append(x)
    return maps[0], maps[2], _cbr(state, x, "layer4.layer.0", "layer4.layer.1")
