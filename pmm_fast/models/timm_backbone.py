"""Backbones of timm by name: any of its networks that gives maps ``[N, C, h, w]`` with one at a quarter of the image.

timm is an extra and imported on first use.  Its networks are taken as they are but for some layers: batch norm becomes
ours, which several ranks and second derivatives need, plain convolutions too, whose second derivative is slow, and the
hard sigmoid, which has none, is written out.

Shapes: N images of H x W pixels; the low-level map at a quarter, the last at the output stride.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pmm_fast.models.batchnorm import BatchNorm2d
from pmm_fast.models.blocks import Stages
from pmm_fast.models.conv import Conv2d

PREFIX = "timm/"
"""What the name of such a backbone begins with: ``timm/convnext_tiny``."""

_QUARTER = 4
# the stride that classifiers have without being asked
_FULL_STRIDE = 32


class TimmBackbone(nn.Module):
    """A network of timm without its classifier, its weights random.

    Args:
        name: as timm knows it, e.g. ``convnext_tiny``.
        output_stride: 8, 16 or 32, input pixels a position of the last map.

    Attributes:
        low_level_channels, aux_channels, channels: widths of the three maps returned: the last one at a quarter of the
            image, the last but one, and the last.
        whitened_channels: none; there is no variant with instance norms here.

    Raises:
        ImportError: timm is not installed, or cannot be imported.
        ValueError: an unknown name (the nearest are named), or a network that has no such maps.

    Note:
        A network that rounds sizes down (one that cuts the image into patches), or refuses some, gets images filled up
        with zeros, on the right and at the bottom, to a multiple of the output stride: sizes round up, as in every
        other backbone.
    """

    whitened_channels: tuple[int, ...] = ()

    def __init__(self, name: str, output_stride: int = 16) -> None:
        super().__init__()
        self.name, self.output_stride = name, output_stride
        timm = _import_timm(name)
        if not timm.is_model(name):
            near = difflib.get_close_matches(name, timm.list_models(), n=3)
            hint = f"; did you mean {' or '.join(PREFIX + other for other in near)}?" if near else ""
            raise ValueError(f"backbone {PREFIX}{name}: timm {timm.__version__} has no such network{hint}")
        try:
            self.network = _create(timm, name, output_stride, pretrained=False)
            info: Any = self.network.feature_info
            widths, strides = list(info.channels()), list(info.reduction())
            # the positions of the three maps among those of timm
            self._taken = _find_quarter(strides, output_stride), len(strides) - 2, len(strides) - 1
            self._strides = [strides[tap] for tap in self._taken]
            self._rounds_down = not _rounds_up(self.network, widths, strides, output_stride)
            _use_own_layers(self.network)
        # a network of timm that cannot do something says so in its own way
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            hint = "" if output_stride == _FULL_STRIDE else "; a network that cannot be dilated has 32"
            raise ValueError(
                f"backbone {PREFIX}{name}: no maps [N, C, h, w] at a quarter of the image and at output stride "
                f"{output_stride} ({reason}){hint}"
            ) from error
        self.low_level_channels, self.aux_channels, self.channels = (widths[tap] for tap in self._taken)

    def forward(self, images: Tensor) -> Stages:
        """``[N, 3, H, W]`` to the three maps, whose sizes round up."""
        height, width = images.shape[2:]
        if self._rounds_down:
            images = F.pad(images, (0, -width % self.output_stride, 0, -height % self.output_stride))
        found = self.network(images)
        # what is more than the image rounded up comes from the padding
        return Stages(
            *(
                found[tap][:, :, : -(-height // stride), : -(-width // stride)]
                for tap, stride in zip(self._taken, self._strides, strict=True)
            )
        )

    def pretrained_weights(self) -> tuple[dict[str, Tensor], str]:
        """The ImageNet weights that timm has of this network, by the names here, and a line about them.

        Raises:
            FileNotFoundError: timm has none, or cannot fetch them; what to do instead.
        """
        try:
            trained = _create(_import_timm(self.name), self.name, self.output_stride, pretrained=True)
        # whatever the network or the hub's client raises
        except Exception as error:
            raise FileNotFoundError(
                f"no ImageNet weights for {PREFIX}{self.name}: timm could not fetch them ({error})\n"
                "  do one of: once on a machine with a network, then copy the folder HF_HOME; --model.weights FILE "
                "with timm's weights; --model.weights none for a random start"
            ) from error
        about: Any = trained.pretrained_cfg
        statistics = ", ".join(f"{key} {' '.join(map(str, about[key]))}" for key in ("mean", "std") if key in about)
        return {f"network.{key}": value for key, value in trained.state_dict().items()}, f"trained with {statistics}"

    def own_names(self, weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """The weights of a classifier of timm by the names here, and what of it has no counterpart.

        timm joins the first two names of a part (``stages.0`` to ``stages_0``), or wraps the whole (``body``,
        ``model``), when it hands out maps.
        """
        wanted = self.network.state_dict().keys()
        found, unused = {}, dict[str, None]()
        for key, value in weights.items():
            spellings = (key, key.replace(".", "_", 1), f"body.{key}", f"model.{key}")
            ours = next((name for name in spellings if name in wanted), None)
            if ours is None:
                unused[key] = None
            else:
                found[f"network.{ours}"] = value
        return found, list(unused)


class _BatchNormAct2d(BatchNorm2d):
    """timm's batch norm with what follows it."""

    drop: nn.Module
    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


class _HardSigmoid(nn.Hardsigmoid):
    """clamp(x + 3, 0, 6) / 6; PyTorch's own has no second derivative."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu6(x + 3) / 6


def _import_timm(name: str) -> ModuleType:
    try:
        import timm
    # a torchvision that was built for another torch raises RuntimeError
    except Exception as error:
        raise ImportError(
            f"backbone {PREFIX}{name} needs the extra timm: pip install 'pmm_fast[timm]' ({error})"
        ) from error
    return timm


def _create(timm: ModuleType, name: str, output_stride: int, pretrained: bool) -> nn.Module:
    return timm.create_model(
        name,
        pretrained=pretrained,
        features_only=True,
        # networks that cannot be dilated do not know the option
        output_stride=None if output_stride == _FULL_STRIDE else output_stride,
        # activations as plain functions, which differentiate twice and can be traced
        exportable=True,
    )


def _find_quarter(strides: Sequence[int], output_stride: int) -> int:
    """Position of the last map at a quarter of the image, which must not be the last of all."""
    if strides[-1] != output_stride:
        raise ValueError(f"its last map is at stride {strides[-1]}")
    places = [place for place, stride in enumerate(strides[:-1]) if stride == _QUARTER]
    if not places:
        raise ValueError(f"its maps are at strides {', '.join(map(str, strides))}")
    return places[-1]


def _rounds_up(network: nn.Module, widths: Sequence[int], strides: Sequence[int], output_stride: int) -> bool:
    """Whether a network takes images of any size and rounds the sizes of its maps up, after a look at two images.

    Raises:
        ValueError: other maps than the network's description has.
    """
    network.eval()
    height, width = 4 * output_stride, 6 * output_stride
    found, expected = _shapes(network, height, width), _expected_shapes(widths, strides, height, width)
    if found != expected:
        raise ValueError(f"images of {height} x {width} give maps {found}, expected {expected}")
    try:
        found = _shapes(network, height + 1, width + 1)
    # it may refuse such a size in its own way
    except Exception:
        found = []
    network.train()
    return found == _expected_shapes(widths, strides, height + 1, width + 1)


def _shapes(network: nn.Module, height: int, width: int) -> list[tuple[int, ...]]:
    """The shapes of a network's maps of one image."""
    images = torch.zeros(1, 3, height, width, device=next(network.parameters()).device)
    with torch.no_grad():
        return [tuple(x.shape) for x in network(images)]


def _expected_shapes(widths: Sequence[int], strides: Sequence[int], height: int, width: int) -> list[tuple[int, ...]]:
    return [(1, c, -(-height // s), -(-width // s)) for c, s in zip(widths, strides, strict=True)]


def _use_own_layers(network: nn.Module) -> None:
    """Layers with a second derivative, our batch norm and convolutions among them, in place: names and hooks stay.

    Raises:
        ValueError: a batch norm that ours is no substitute for.
    """
    for name, module in network.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            has_act = hasattr(module, "act") and hasattr(module, "drop")
            plain = module.affine and module.track_running_stats and module.momentum is not None
            if not (type(module) is nn.BatchNorm2d or (isinstance(module, nn.BatchNorm2d) and has_act)) or not plain:
                raise ValueError(f"its batch norm {name} is of a kind that is not known here: {module}")
            module.__class__ = _BatchNormAct2d if has_act else BatchNorm2d
        elif type(module) is nn.Conv2d and module.padding_mode == "zeros" and not isinstance(module.padding, str):
            module.__class__ = Conv2d
            module.__dict__["_geometry"] = (module.stride, module.padding, module.dilation, module.groups)
        elif type(module) is nn.Hardsigmoid:
            module.__class__ = _HardSigmoid
