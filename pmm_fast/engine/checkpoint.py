"""Checkpoints: written whole or not at all, read without executing anything.

A file is a ``torch.save`` dictionary of tensors and plain values::

    format      "pmm_fast/1"
    model       settings (arguments of build_model), label_space, state (parameters, buffers, memory.slots)
    config      the resolved configuration of the run, or None
    training    iteration, optimizer, scaler, RNG states; absent in a file made by save()
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pmm_fast.config import CHECKPOINT_FILE, Config, from_dict, to_dict
from pmm_fast.models import Segmentor, build_model

FORMAT = "pmm_fast/1"
FILE_NAME = CHECKPOINT_FILE

_RELEASED = " (a released .pth is read by pmm_fast.convert.from_released)"


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, read or used here."""


def write(path: str | Path, content: dict[str, Any]) -> None:
    """Write a checkpoint atomically: a reader sees the old file or the new one, never a part.

    Raises:
        CheckpointError: the file could not be written (disk full, no permission); an older file at ``path`` survives.
    """
    path = Path(path)
    # not from tempfile, whose files nobody else may read
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        kept = "; the previous checkpoint is untouched" if path.exists() else ""
        # torch's writer hides the reason behind an error of its own
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        raise CheckpointError(f"{path}: could not write the checkpoint ({reason}){kept}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def read(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint file, or the one in a run's folder.

    Raises:
        CheckpointError: missing, unreadable, or not a checkpoint of pmm_fast.
    """
    path = Path(path)
    if path.is_dir():
        path = path / FILE_NAME
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read, perhaps damaged or cut off ({error.strerror})") from error
    except Exception as error:
        # torch raises whatever the zip reader or the unpickler meets, with advice to execute what is in the file
        raise CheckpointError(f"{path}: no checkpoint, or damaged or cut off{_RELEASED}") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        hint = _RELEASED if found is None else ""
        raise CheckpointError(f"{path}: expected a checkpoint of format {FORMAT}, got {found}{hint}")
    return content


def describe_model(model: nn.Module) -> dict[str, Any]:
    """The ``model`` entry of a checkpoint."""
    return {"settings": model.settings, "label_space": model.label_space, "state": model.state_dict()}


def save(model: Segmentor, path: str | Path, config: Config | None = None) -> None:
    """Write a model (parameters, buffers, memory) for :func:`load`.

    Args:
        model: the network.
        path: file to write, atomically.
        config: configuration to keep with it.

    Raises:
        CheckpointError: the file could not be written.
    """
    write(
        path,
        {"format": FORMAT, "model": describe_model(model), "config": None if config is None else to_dict(config)},
    )


def load(path: str | Path, label_space: str | None = None) -> Segmentor:
    """Rebuild the model of a checkpoint, on the CPU, in evaluation mode.

    Args:
        path: checkpoint file or run folder.
        label_space: label space that the model must have been trained for; None: any.

    Raises:
        CheckpointError: missing or unreadable file, another label space, or weights that do not fit their settings.
    """
    content = read(path)["model"]
    if label_space is not None and content["label_space"] != label_space:
        raise CheckpointError(
            f"{path}: trained for the label space {content['label_space']} "
            f"({content['settings']['num_classes']} classes), expected {label_space}"
        )
    model = build_model(**content["settings"])
    model.label_space = content["label_space"]
    load_state(model, content["state"], path)
    return model.eval()


def load_state(model: Segmentor, state: dict[str, torch.Tensor], path: str | Path) -> None:
    """Copy a checkpoint's values into a model; every key must fit."""
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        reasons = "; ".join(line.strip() for line in str(error).splitlines()[1:])
        raise CheckpointError(f"{path}: the weights do not fit the model: {reasons}") from error


def read_config(path: str | Path) -> Config:
    """The configuration that a checkpoint was trained with.

    Raises:
        CheckpointError: unreadable, or a checkpoint without a configuration.
    """
    stored = read(path)["config"]
    if stored is None:
        raise CheckpointError(f"{path}: holds no configuration")
    return from_dict(stored, origin=str(path))
