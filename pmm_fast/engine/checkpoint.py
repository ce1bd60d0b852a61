"""Checkpoints: written whole or not at all, read without executing anything.

A file is a ``torch.save`` dictionary of tensors and plain values::

    format      "pmm_fast/1"
    model       settings (arguments of build_model), label_space, state (parameters, buffers, memory.slots)
    config      the resolved configuration of the run, or None
    training    iteration, optimizer, scaler, RNG states; absent in a file made by save()

A name that ends in ``.safetensors`` gives a safetensors file instead: the tensors of ``state`` by their names, and
``format``, ``settings``, ``label_space`` and ``config`` as its metadata, all but the first in JSON; it has no
``training``.  Which of the two a file is is seen by its first bytes.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save as safetensors_bytes
from torch import nn

from pmm_fast.config import CHECKPOINT_FILE, Config, from_dict, to_dict
from pmm_fast.data.labels import get_space
from pmm_fast.models import Segmentor, build_model
from pmm_fast.models.released import check_finite, is_released, looks_like

FORMAT = "pmm_fast/1"
FILE_NAME = CHECKPOINT_FILE

_SAFETENSORS = ".safetensors"

# the released code saves a mean IoU that it computed as a number of numpy's; numpy 1 had the function elsewhere
_SCALAR = np.float64(0).__reduce__()[0]
_NUMPY_NUMBERS: list[Any] = [
    _SCALAR,
    (_SCALAR, "numpy.core.multiarray.scalar"),
    np.dtype,
    type(np.dtype(np.float32)),
    type(np.dtype(np.float64)),
]

# what people give instead of a checkpoint, by its first bytes
_SIGNATURES = {
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF8": "a GIF image",
    b"RIFF": "a WebP image or a video",
    b"%PDF": "a PDF document",
    b"\x1f\x8b": "a gzip archive",
    b"\x89HDF": "an HDF5 file",
    b"<!DOCTYPE": "a web page",
    b"<html": "a web page",
}


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, read or used here."""


def write(path: str | Path, content: dict[str, Any]) -> None:
    """Write a checkpoint atomically: a reader sees the old file or the new one, never a part.

    Args:
        path: file to write; ``.safetensors`` gives that format, any other name a ``torch.save`` file.
        content: the dictionary described above; for ``torch.save``, any of tensors and plain values.

    Raises:
        CheckpointError: the file could not be written (disk full, no permission); an older file at ``path`` survives.
            Or the state of a training is to go into a safetensors file.
    """
    path = Path(path)
    packed = _pack(content, path) if path.suffix == _SAFETENSORS else None
    # not from tempfile, whose files nobody else may read
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            if packed is None:
                torch.save(content, file)
            else:
                file.write(packed)
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
    """Read a checkpoint file of either format, or the one in a run's folder.

    Raises:
        CheckpointError: missing, unreadable, or not a checkpoint of pmm_fast.
    """
    return checked(unpack(path), path)


def unpack(path: str | Path) -> Any:
    """What a file of either format holds, a checkpoint of pmm_fast or not; nothing in it is executed.

    Args:
        path: the file, or a run's folder.

    Returns:
        The dictionary of a checkpoint; of another safetensors file its tensors by name; of another ``torch.save`` file
        whatever was saved.

    Raises:
        CheckpointError: missing, unreadable, or a file of neither kind, with what it looks like.
    """
    path = file_of(path)
    if not path.is_file():
        below = sorted(run.parent.name for run in path.parent.glob(f"*/{FILE_NAME}")) if path.name == FILE_NAME else []
        hint = f"; there are in its folders {', '.join(below)}" if below else ""
        raise CheckpointError(f"{path}: no such checkpoint{hint}")
    head = b""
    try:
        with path.open("rb") as file:
            head = file.read(16)
            # a safetensors file begins with the length of its header in eight bytes, and its header is JSON
            if head[8:9] == b"{":
                return _unpack_safetensors(path)
            file.seek(0)
            # not by its path, whose suffix torch would believe
            with torch.serialization.safe_globals(_NUMPY_NUMBERS):
                return torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read, perhaps damaged or cut off ({error.strerror})") from error
    except Exception as error:
        # readers raise whatever they meet, torch's with advice to execute what is in the file
        if refused := re.search(r"Unsupported global: GLOBAL (\S+)", str(error)):
            raise CheckpointError(
                f"{path}: holds a Python object, {refused[1]}, and is not read, for that could execute what is in it; "
                "save it again with tensors and plain values alone"
            ) from error
        kind = next((kind for start, kind in _SIGNATURES.items() if head.startswith(start)), "")
        hint = " (the file is empty)" if not head else f" (it looks like {kind})" if kind else ""
        raise CheckpointError(f"{path}: no checkpoint, or damaged or cut off{hint}") from error


def checked(content: Any, path: str | Path) -> dict[str, Any]:
    """The same content, if it is that of a checkpoint of pmm_fast.

    Args:
        content: what :func:`unpack` found.
        path: where, for the message.

    Raises:
        CheckpointError: it is something else; one of the released code is told with the command that converts it.
    """
    found = content.get("format") if isinstance(content, dict) else None
    if found == FORMAT:
        model = content.get("model")
        if (
            "config" not in content
            or not isinstance(model, dict)
            or not {"settings", "label_space", "state"} <= set(model)
        ):
            raise CheckpointError(
                f"{path}: damaged: expected the entries model (settings, label_space, state) and config"
            )
        return content
    if is_released(content):
        target = Path(path).with_suffix(_SAFETENSORS)
        raise CheckpointError(
            f"{path}: a checkpoint of the released code; convert it: python -m pmm_fast.convert {path} {target}"
        )
    if isinstance(found, str):
        raise CheckpointError(f"{path}: expected a checkpoint of format {FORMAT}, got {found}")
    raise CheckpointError(f"{path}: a checkpoint neither of pmm_fast nor of the released code: {looks_like(content)}")


def file_of(path: str | Path) -> Path:
    """The file itself, or the checkpoint of a run's folder."""
    path = Path(path)
    return path / FILE_NAME if path.is_dir() else path


def describe_model(model: nn.Module) -> dict[str, Any]:
    """The ``model`` entry of a checkpoint."""
    return {"settings": model.settings, "label_space": model.label_space, "state": model.state_dict()}


def content_of(model: Segmentor, config: Config | None = None) -> dict[str, Any]:
    """A checkpoint's content without the state of a training, for :func:`write`."""
    return {"format": FORMAT, "model": describe_model(model), "config": None if config is None else to_dict(config)}


def save(model: Segmentor, path: str | Path, config: Config | None = None) -> None:
    """Write a model (parameters, buffers, memory) for :func:`load`.

    Args:
        model: the network.
        path: file to write, atomically; ``.safetensors`` gives that format.
        config: configuration to keep with it.

    Raises:
        CheckpointError: the file could not be written.
    """
    write(path, content_of(model, config))


def load(path: str | Path, label_space: str | None = None) -> Segmentor:
    """Rebuild the model of a checkpoint, on the CPU, in evaluation mode.

    Args:
        path: checkpoint file of either format, or run folder.
        label_space: label space that the model must have been trained for; None: any.

    Raises:
        CheckpointError: missing or unreadable file, another label space, or weights that do not fit their settings.
    """
    content = read(path)
    model = content["model"]
    if label_space is not None and model["label_space"] != label_space:
        raise CheckpointError(
            f"{path}: trained for the label space {model['label_space']} "
            f"({model['settings']['num_classes']} classes), expected {label_space}"
        )
    return rebuild(content, path)


def rebuild(content: dict[str, Any], path: str | Path) -> Segmentor:
    """The model of a checkpoint's content, on the CPU, in evaluation mode.

    Args:
        content: what :func:`read` returned.
        path: where it was read, for the message.

    Raises:
        CheckpointError: settings that this version does not know, classes that are not those of the label space, or
            weights that do not fit or are not finite.
    """
    space = content["model"]["label_space"]
    try:
        model = build_model(**content["model"]["settings"])
        if space is not None and get_space(space).num_classes != model.num_classes:
            raise ValueError(f"{model.num_classes} classes, but {space} has {get_space(space).num_classes}")
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged, or of another version of pmm_fast: {error}") from error
    model.label_space = space
    load_state(model, content["model"]["state"], path)
    try:
        check_finite(model.state_dict())
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
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


def _pack(content: dict[str, Any], path: Path) -> bytes:
    """A checkpoint as a safetensors file."""
    if "training" in content:
        raise CheckpointError(
            f"{path}: a safetensors file holds a model alone; the state of a training goes into a .pt"
        )
    model = content["model"]
    metadata = {
        "format": content["format"],
        "settings": json.dumps(model["settings"]),
        "label_space": json.dumps(model["label_space"]),
        "config": json.dumps(content["config"]),
    }
    return safetensors_bytes({name: tensor.contiguous() for name, tensor in model["state"].items()}, metadata)


def _unpack_safetensors(path: Path) -> dict[str, Any]:
    """The reverse of :func:`_pack`; of another file its tensors by name."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if "settings" not in metadata:
        return state
    settings, label_space, config = (json.loads(metadata[key]) for key in ("settings", "label_space", "config"))
    model = {"settings": settings, "label_space": label_space, "state": state}
    return {"format": metadata["format"], "model": model, "config": config}
