"""From a configuration to the objects of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import nn

from pmm_fast import meta
from pmm_fast.config import Config
from pmm_fast.data import FolderDomain, get_space, open_domain
from pmm_fast.models import Segmentor, build_model, load_backbone

AMP_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str) -> torch.device:
    """``auto`` is the first GPU, or the CPU without one.  A GPU with a number becomes the current one, Triton's too.

    Raises:
        ValueError: a device of another kind, or a GPU that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    expected = f"device: expected auto, cpu, cuda or cuda:N, got {name!r}"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(expected) from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(expected)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: {name!r} was asked for, but torch finds no GPU here")
    last = torch.cuda.device_count() - 1
    if device.type == "cuda" and (device.index or 0) > last:
        raise ValueError(f"device: {name!r} was asked for, but torch finds GPUs 0..{last} here")
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def amp_type(config: Config) -> torch.dtype | None:
    """The autocast type of a run, or None without mixed precision."""
    return AMP_TYPES[config.amp_dtype] if config.amp else None


def memory_format(autocast: torch.dtype | None, device: torch.device) -> torch.memory_format:
    """Channels last on a GPU in mixed precision, whose tensor cores take nothing else; a CPU gains nothing by it."""
    return torch.channels_last if device.type == "cuda" and autocast is not None else torch.contiguous_format


def place(model: nn.Module, device: torch.device, autocast: torch.dtype | None) -> None:
    """Move a network to a device, its weights in the layout of :func:`memory_format`."""
    model.to(device).to(memory_format=memory_format(autocast, device))  # type: ignore[call-overload]


def set_float32_precision(tf32: bool) -> None:
    """Whether float32 convolutions and products on a GPU may round to TF32; PyTorch lets convolutions do it unasked."""
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32


def run_folder(config: Config) -> Path:
    """Where a run is written: ``out``, or ``runs/MODE``."""
    return Path(config.out or f"runs/{config.meta.mode}")


def source_names(config: Config) -> list[str]:
    """Source domains of a run; one alone is taken twice where the method needs two (the G,G protocol)."""
    names = list(config.data.sources)
    if len(names) == 1 and config.meta.mode in meta.META_MODES:
        names *= 2
    return names


def open_sources(config: Config, split: Literal["train", "val"] = "train") -> list[FolderDomain]:
    """The source domains, in order; a repeated name is opened once and used twice."""
    opened = {name: open_domain(name, config.data, split) for name in dict.fromkeys(source_names(config))}
    return [opened[name] for name in source_names(config)]


def create_model(config: Config) -> tuple[Segmentor, str]:
    """A network at the start of training, on the CPU, and a line telling where its backbone comes from."""
    torch.manual_seed(config.seed)
    model = build_model(
        config.model.architecture,
        get_space(config.data.label_space).num_classes,
        channels=config.model.channels,
        output_stride=config.model.output_stride,
        memory=config.meta.mode in meta.MEMORY_MODES,
        aux_dropout=config.model.aux_dropout,
        temperature=config.memory.temperature,
        instance_norm=config.model.instance_norm,
    )
    model.label_space = config.data.label_space
    return model, load_backbone(model, config.model.weights)


def create_hyper(config: Config, network: meta.Network, inner_lr: float, loss_scale: float = 1.0) -> meta.Hyper:
    """The step's settings for one iteration."""
    return meta.Hyper(
        network=network,
        mode=config.meta.mode,
        order=config.meta.order,
        inner_lr=inner_lr,
        memory_momentum=config.memory.momentum,
        temperature=config.memory.temperature,
        cohesion_temperature=config.memory.cohesion_temperature,
        aux_weight=config.meta.aux_weight,
        cohesion_weight=config.meta.cohesion_weight,
        divergence_weight=config.meta.divergence_weight,
        classifier_weight=config.meta.classifier_weight,
        whitening_weight=config.whitening.weight,
        loss_scale=loss_scale,
        autocast=amp_type(config),
    )
