"""Reading image and label files.

``read_labels`` knows four encodings (``LABEL_FORMATS``) and returns ids of the space that is learnt.  Whatever is wrong
with a file raises ``DataError``, which names it.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image, ImageDraw, UnidentifiedImageError

from pmm_fast.data.label_ids import ID_TABLES
from pmm_fast.data.labels import IGNORE, INVALID, SPACES, get_space, mapping, num_ids, suggestion

LabelFormat = Literal["ids", "ids16", "colours", "polygons"]

LABEL_FORMATS: tuple[LabelFormat, ...] = get_args(LabelFormat)
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
POLYGON_TABLE = "idd_ids"
POLYGON_BACKGROUND = "unlabeled"

# what Pillow's decoders raise on damaged files
_DECODER_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


class DataError(ValueError):
    """Something is wrong with the files of a domain; the message names the file or option and what was expected."""


class EncodingError(DataError):
    """A label file is written in another way than was said.

    Attributes:
        found: what was expected and what was found.
    """

    # with a default, for workers to send it
    def __init__(self, found: str, advice: str = "") -> None:
        super().__init__(f"{found}; {advice}" if advice else found)
        self.found = found


def walk(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Every folder from ``root`` downwards with the names of its files, sorted; links to folders are followed.

    Raises:
        DataError: a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: the folder cannot be read: {error.strerror}") from error

    seen: set[str] = set()
    # data sets are often assembled from links to folders; `seen` ends a cycle of them
    for folder, children, files in os.walk(root, onerror=refuse, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            children.clear()
            continue
        seen.add(real)
        children.sort()
        yield folder, sorted(files)


def label_suffixes(label_format: LabelFormat) -> tuple[str, ...]:
    """Extensions of label files, lower case."""
    return (".json",) if label_format == "polygons" else (".png",)


def check_encoding(label_format: str, source: str, target: str, where: str) -> None:
    """Refuse what cannot be read, before any file is.

    Args:
        label_format: one of ``LABEL_FORMATS``.
        source: label space or id table of the files.
        target: label space to learn.
        where: whose options these are, for the message.

    Raises:
        DataError: no such format, or a format that does not go with the space of the files.
        ValueError: an unknown space, or no mapping between the two.
    """
    if label_format not in LABEL_FORMATS:
        expected = f"{', '.join(LABEL_FORMATS[:-1])} or {LABEL_FORMATS[-1]}"
        raise DataError(f"{where}.label_format: expected {expected}, got {label_format!r}")
    mapping(source, target)
    if label_format == "colours" and source not in SPACES:
        raise DataError(
            f"{where}.label_space: label_format: colours needs a space with colours{suggestion(source, SPACES)}, "
            f"got {source}"
        )
    if label_format == "polygons" and source != POLYGON_TABLE:
        raise DataError(f"{where}.label_space: expected {POLYGON_TABLE} with label_format: polygons, got {source}")


def read_image(path: Path) -> Image.Image:
    """Read an image file.

    Returns:
        The decoded PIL image in mode RGB.

    Raises:
        DataError: it is missing, damaged, or has 16 bits a channel.
    """
    image, depth = _decode(path)
    _check_image(path, image.mode, depth)
    return image if image.mode == "RGB" else image.convert("RGB")


def read_size(path: Path) -> tuple[int, int]:
    """(width, height) of an image file, from its header.

    Raises:
        DataError: it is missing or no image, or has 16 bits a channel.
    """
    image, depth = _decode(path, load=False)
    _check_image(path, image.mode, depth)
    return image.size


def _check_image(path: Path, mode: str, depth: int) -> None:
    if depth == 16 or mode.startswith(("I", "F")):
        found = f"mode {mode}" if mode.startswith(("I", "F")) else f"16 bits, mode {mode}"
        raise DataError(f"{path}: expected an 8-bit image, got {found}; convert it to 8 bits a channel")


def read_labels(path: Path, label_format: LabelFormat, source: str, target: str) -> np.ndarray:
    """Read a label file.

    Args:
        path: the file.
        label_format: ``ids``: one 8-bit channel, PNG mode L or P (the index counts); ``ids16``: 16-bit PNG of one or
            three channels, the first being the id; ``colours``: RGB, RGBA or palette PNG in the colours of ``source``,
            other colours being ignored; ``polygons``: IDD's JSON.
        source: label space or id table of the file.
        target: label space to return.

    Returns:
        uint8 ``[H, W]``, ids of ``target`` with 255 for ignore.

    Raises:
        DataError: the file is missing, damaged, of another encoding, or holds ids that ``source`` does not have.
        ValueError: an unknown space, or no mapping between the two.
    """
    if label_format == "colours":
        return _read_colours(path, source, target)
    read = {"ids": _read_ids, "ids16": _read_ids16, "polygons": _read_polygons}[label_format]
    return _to_target(path, read(path), source, target)


# --- decoding -----------------------------------------------------------------------------------------------------


def _decode(path: Path, low_bytes: bool = False, load: bool = True) -> tuple[Image.Image, int]:
    """The image, decoded unless ``load`` is false, and, for a PNG, its bits a channel (8 for other formats).

    ``low_bytes``: of a 16-bit RGB PNG take the low byte of each value, which Pillow drops otherwise.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(25)
            file.seek(0)
            image = Image.open(file)
            if low_bytes:
                # PNG has the high byte first; read as if it came last, the one that is kept is the low one
                image.tile = [(*image.tile[0][:3], "RGB;16L")]  # type: ignore[list-item]
            if load:
                image.load()
    except UnidentifiedImageError as error:
        raise DataError(f"{path}: cannot be read as an image: the file is no image") from error
    except _DECODER_ERRORS as error:
        raise DataError(f"{path}: cannot be read as an image: {error}") from error
    return image, head[24] if head.startswith(b"\x89PNG") else 8


def _decode_label(path: Path) -> Image.Image:
    image, depth = _decode(path)
    # Pillow reads 16-bit RGB as its high bytes, which would turn every id into 0
    if depth == 16 or image.mode.startswith("I"):
        raise EncodingError(
            f"{path}: expected an 8-bit label, got 16 bits",
            "convert it to 8-bit ids (one channel) first, or, if its first channel is the class, "
            "set label_format: ids16",
        )
    return image


def _read_ids(path: Path) -> np.ndarray:
    image = _decode_label(path)
    if image.mode not in ("L", "P"):
        hint = "for labels in colours set label_format: colours" if image.mode in ("RGB", "RGBA") else ""
        raise EncodingError(f"{path}: expected one 8-bit channel of ids (mode L or P), got mode {image.mode}", hint)
    return np.asarray(image)


def _read_ids16(path: Path) -> np.ndarray:
    image, depth = _decode(path)
    if depth != 16:
        hint = "for 8-bit ids set label_format: ids" if image.mode in ("L", "P") else ""
        raise EncodingError(f"{path}: expected a 16-bit PNG of ids, got 8 bits, mode {image.mode}", hint)
    if image.mode.startswith("I"):
        return np.asarray(image).astype(np.uint16)
    if image.mode != "RGB":
        raise DataError(f"{path}: expected a 16-bit PNG of one or three channels, got one with alpha")
    low, _ = _decode(path, low_bytes=True)
    high = np.asarray(image.getchannel(0)).astype(np.uint16)
    return high << 8 | np.asarray(low.getchannel(0))


def _to_target(path: Path, raw: np.ndarray, source: str, target: str) -> np.ndarray:
    table = _id_table(source, target)
    labels = table.take(raw if raw.dtype == np.uint8 else np.where(raw > IGNORE, INVALID, raw))
    bad = labels == INVALID
    if bad.any():
        values = np.unique(raw[bad])
        shown = ", ".join(map(str, values[:8])) + (", ..." if len(values) > 8 else "")
        raise DataError(
            f"{path}: values {shown} in {int(bad.sum())} pixels are no ids of label space {source!r} "
            f"(0..{num_ids(source) - 1}, {IGNORE} for ignore)"
        )
    return labels


def _read_colours(path: Path, source: str, target: str) -> np.ndarray:
    image = _decode_label(path)
    if image.mode == "P":
        return _palette_table(image, source, target).take(np.asarray(image))
    if image.mode not in ("RGB", "RGBA"):
        hint = "for labels in ids set label_format: ids" if image.mode == "L" else ""
        raise EncodingError(f"{path}: expected colours (mode RGB or palette), got mode {image.mode}", hint)
    # four bytes a pixel make one integer a pixel, in one pass
    pixels = np.asarray(image if image.mode == "RGBA" else image.convert("RGBX")).view("<u4")[..., 0]
    return _colour_table(source, target).take(pixels & 0xFFFFFF)


@lru_cache(maxsize=16)
def _id_table(source: str, target: str) -> np.ndarray:
    return mapping(source, target)


@lru_cache(maxsize=2)
def _colour_table(source: str, target: str) -> np.ndarray:
    """Target id of each of the 2^24 colours: one look-up a pixel, however many classes (16 MB, few pages touched)."""
    table = np.full(1 << 24, IGNORE, np.uint8)
    ids = mapping(source, target)
    for index, (red, green, blue) in enumerate(get_space(source).colours):
        table[red | green << 8 | blue << 16] = ids[index]
    return table


def _palette_table(image: Image.Image, source: str, target: str) -> np.ndarray:
    palette = np.asarray(image.getpalette("RGB"), np.uint32).reshape(-1, 3)
    table = np.full(256, IGNORE, np.uint8)
    table[: len(palette)] = _colour_table(source, target)[palette[:, 0] | palette[:, 1] << 8 | palette[:, 2] << 16]
    return table


# --- polygons -----------------------------------------------------------------------------------------------------


def _read_polygons(path: Path) -> np.ndarray:
    """IDD's polygons as ids of ``POLYGON_TABLE``, later ones over earlier ones, the rest unlabeled."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON: {error}") from error
    names = ID_TABLES[POLYGON_TABLE].names
    try:
        size = int(content["imgWidth"]), int(content["imgHeight"])
        canvas = Image.new("L", size, names.index(POLYGON_BACKGROUND))
        draw = ImageDraw.Draw(canvas)
        for part in content["objects"]:
            if not part.get("deleted"):
                points = [(x, y) for x, y in part["polygon"]]
                draw.polygon(points, fill=_polygon_id(path, part["label"], names))
    except DataError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path}: expected imgWidth, imgHeight and objects of label and polygon (points x, y), as IDD has them: "
            f"{type(error).__name__} {error}"
        ) from error
    return np.asarray(canvas)


def _polygon_id(path: Path, label: Any, names: tuple[str, ...]) -> int:
    # a crowd that was outlined as one: cargroup, persongroup
    for name in (label, str(label).removesuffix("group")):
        if name in names:
            return names.index(name)
    raise DataError(f"{path}: unknown label {label!r}{suggestion(str(label), names)}")
