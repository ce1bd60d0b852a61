"""Test protocols by name: the one table of what each of them fixes, and ``eval`` options on top of it.

The released ones are what the scripts of the released code run (``pinmem_eval_abla_scripts``, and the test at the end
of ``train.py``); ``docs/evaluate.md`` describes every column and what of them is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from pmm_fast.config.schema import EvalConfig, MapillaryTest, Resample

Method = Literal["whole", "sliding", "pooling"]


@dataclass(frozen=True)
class EvalProtocol:
    """A test protocol in full: nothing is left open but how many images are tested and how fast.

    Attributes:
        name: its key in ``EVAL_PROTOCOLS``.
        method: ``whole``: the whole image, logits averaged over scales and mirrored images; ``sliding``: the same with
            overlapping tiles; ``pooling``: whole images, softmax probabilities averaged.
        scales: image scales, each positive.
        flip: whether the mirrored image is averaged in.
        crop: side of a tile at scales up to 1, in pixels; a tile grows with larger scales.
        overlap: share of a tile that the next one covers.
        height: height in pixels that images (never labels) are resized to before they are scaled; 0: as they are.
        resample: filter of both resizes.
        noise: whether the memory is read with Gumbel noise.
        mapillary: what becomes of images and labels of the data set ``mapillary``.
    """

    name: str
    method: Method
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    crop: int = 768
    overlap: float = 1 / 3
    height: int = 0
    resample: Resample = "bicubic"
    noise: bool = False
    mapillary: MapillaryTest = "native"


EVAL_PROTOCOLS: dict[str, EvalProtocol] = {
    protocol.name: protocol
    for protocol in (
        EvalProtocol("whole", "whole"),
        EvalProtocol("sliding", "sliding"),
        EvalProtocol("pooling", "pooling", scales=(0.5, 1.0, 2.0), flip=True),
        EvalProtocol("released-train", "whole", noise=True, mapillary="released"),
        EvalProtocol("released-sliding", "sliding", flip=True, resample="bilinear", noise=True, mapillary="released"),
        EvalProtocol("released-pooling", "pooling", noise=True, mapillary="released"),
        EvalProtocol(
            "released-folder",
            "sliding",
            scales=(1.5,),
            flip=True,
            crop=640,
            overlap=0.5,
            resample="bilinear",
            noise=True,
        ),
    )
}
"""Every protocol by its name."""

PROTOCOL_FIELDS = tuple(field.name for field in fields(EvalProtocol) if field.name not in ("name", "method"))
"""What a protocol fixes and an option of ``eval`` can override."""


def resolve_protocol(settings: EvalConfig) -> EvalProtocol:
    """The protocol that ``settings`` name, with every option that they give in its place.

    Args:
        settings: validated (``config.validate``); an option that is None stays as the protocol has it.

    Raises:
        KeyError: no protocol has that name.
    """
    given = {name: value for name in PROTOCOL_FIELDS if (value := getattr(settings, name)) is not None}
    if "scales" in given:
        given["scales"] = tuple(given["scales"])
    return replace(EVAL_PROTOCOLS[settings.protocol], **given)


def forget_protocol(stored: EvalConfig, given: Mapping[str, Any]) -> EvalConfig:
    """What remains of a run's own test settings under options of a command line.

    A protocol that the command line names means all of it: then nothing of the stored protocol stays.

    Args:
        stored: the settings that were stored with a run.
        given: options of the ``eval`` section on the command line.
    """
    return EvalConfig(tile_batch=stored.tile_batch, limit=stored.limit) if "protocol" in given else stored


def describe_eval(protocol: EvalProtocol) -> str:
    """A test protocol in words."""
    size = f"resized to height {protocol.height}" if protocol.height else "at their own size"
    tiles = protocol.method == "sliding"
    overlap = "" if protocol.overlap == EvalProtocol.overlap else f", overlapping by {protocol.overlap:.0%},"
    words = [
        f"tiles of {protocol.crop} x {protocol.crop}{overlap} of images {size}" if tiles else f"whole images {size}"
    ]
    if protocol.scales != (1.0,):
        words.append(f"scales {' '.join(f'{scale:g}' for scale in protocol.scales)}")
    words += ["mirrored too"] if protocol.flip else []
    words += ["probabilities averaged"] if protocol.method == "pooling" else []
    words += ["noise in the read"] if protocol.noise else []
    words += [f"Mapillary {protocol.mapillary}"] if protocol.mapillary != "native" else []
    return ", ".join(words)
