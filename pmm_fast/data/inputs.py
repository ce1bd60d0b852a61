"""What is predicted on: images and videos found by file, folder or pattern, each with a name of its own.

A file is known by its first bytes.  Where they tell nothing, its extension does, so that a damaged image is met as one.
"""

from __future__ import annotations

import glob
import os
import struct
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image, ImageOps

from pmm_fast.data.files import IMAGE_SUFFIXES, DataError, read_image, walk

Kind = Literal["image", "video"]

_IMAGE_SUFFIXES = (*IMAGE_SUFFIXES, ".bmp", ".gif", ".jp2", ".pgm", ".ppm", ".tif", ".tiff", ".webp", ".avif")
_VIDEO_SUFFIXES = (".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ts", ".webm", ".wmv")
_STILL_BRANDS = (b"avif", b"heic", b"heix", b"mif1")
# position and bytes
_HEADS: tuple[tuple[Kind, int, bytes], ...] = (
    ("image", 0, b"\x89PNG\r\n\x1a\n"),
    ("image", 0, b"\xff\xd8\xff"),
    ("image", 0, b"GIF8"),
    ("image", 0, b"II*\0"),
    ("image", 0, b"MM\0*"),
    ("image", 8, b"WEBP"),
    ("image", 4, b"jP  \r\n"),
    ("video", 8, b"AVI "),
    ("video", 4, b"ftyp"),
    ("video", 0, b"\x1aE\xdf\xa3"),
    ("video", 0, b"FLV\x01"),
    ("video", 0, b"\0\0\1\xba"),
    ("video", 0, b"\0\0\1\xb3"),
)
_PATTERN = "*?["


@dataclass(frozen=True)
class Input:
    """A file to predict on.

    Attributes:
        path: the file.
        name: what its outputs are called: ``/``-separated, without extension, different for every input.
        kind: ``image`` or ``video``.
    """

    path: Path
    name: str
    kind: Kind


@dataclass(frozen=True)
class Inputs:
    """What paths led to.

    Attributes:
        found: the inputs, in the order of the paths, sorted within each.
        others: number of files in folders that are neither images nor videos.
    """

    found: tuple[Input, ...]
    others: int


def find_inputs(paths: Sequence[str], leave_out: Collection[Path] = ()) -> Inputs:
    """Find the images and videos that paths name.

    A name is the file's path below the folder (below the fixed part of a pattern; without folders if the file itself
    was named), without extension.  Names that would be shared get more of their paths, or their extensions.

    Args:
        paths: files, folders (searched to the bottom, hidden files and folders apart) and patterns (``*``, ``?``,
            ``[...]``, ``**``); a file that is led to twice counts once.
        leave_out: folders into which no search goes: those of the outputs.

    Raises:
        DataError: a path leads to nothing, or a folder cannot be read.
    """
    found: dict[Path, tuple[Kind, int]] = {}
    others = 0
    for path in paths:
        files, passed_over = _expand(os.path.expanduser(path), leave_out)
        others += passed_over
        for file, kind, depth in files:
            found.setdefault(file, (kind, depth))
    names = _names({file: depth for file, (_, depth) in found.items()})
    return Inputs(tuple(Input(file, names[file], kind) for file, (kind, _) in found.items()), others)


def kind_of(path: Path) -> Kind | None:
    """Whether a file is an image or a video, by its first bytes or else its extension; None if by neither."""
    if path.exists() and not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except OSError:
        # whoever reads it says why it cannot be
        head = b""
    for kind, position, signature in _HEADS:
        if head[position : position + len(signature)] == signature:
            # still images come in the boxes of MP4 too
            return "image" if signature == b"ftyp" and head[8:12] in _STILL_BRANDS else kind
    suffix = path.suffix.lower()
    if suffix in _IMAGE_SUFFIXES:
        return "image"
    return "video" if suffix in _VIDEO_SUFFIXES else None


def upright(image: Image.Image) -> Image.Image:
    """An image turned as its EXIF orientation asks; as it is without one, or where EXIF is damaged."""
    try:
        return ImageOps.exif_transpose(image)
    except (SyntaxError, ValueError, OSError, struct.error):
        # what Pillow raises on EXIF of random bytes; the pixels are sound
        return image


def read_upright(path: Path) -> Image.Image:
    """``read_image`` and :func:`upright`: a network has only seen streets the right way up.

    Returns:
        PIL image, mode RGB.

    Raises:
        DataError: the file is missing, damaged, or has 16 bits a channel.
    """
    return upright(read_image(path))


# --- files --------------------------------------------------------------------------------------------------------

File = tuple[Path, Kind, int]
"""Absolute path, kind, and how many of its last parts make its name."""


def _expand(path: str, leave_out: Collection[Path]) -> tuple[list[File], int]:
    """The files of one path, and the number of others in its folders."""
    if os.path.isdir(path):
        files, others = _below(Path(path), Path(path), leave_out)
        if not files:
            hint = f" (other files: {others})" if others else ""
            raise DataError(f"{path}: the folder holds no image and no video{hint}")
        return files, others
    if os.path.exists(path):
        return [_named(Path(path), Path(path).parent)], 0
    if not any(letter in path for letter in _PATTERN):
        raise DataError(f"{path}: no such file or folder")
    files, others, base = [], 0, _fixed_part(path)
    for match in sorted(glob.glob(path, recursive=True)):
        if os.path.isdir(match):
            below, passed_over = _below(Path(match), base, leave_out)
            files += below
            others += passed_over
        elif not _lies_in(match, leave_out):
            files.append(_named(Path(match), base))
    if not files:
        raise DataError(f"{path}: the pattern matches no image and no video")
    return files, others


def _fixed_part(pattern: str) -> Path:
    """The folders of a pattern before its first wildcard."""
    parts = Path(pattern).parts
    first = next(position for position, part in enumerate(parts) if any(letter in part for letter in _PATTERN))
    return Path(*parts[:first])


def _below(folder: Path, base: Path, leave_out: Collection[Path]) -> tuple[list[File], int]:
    files, others = [], 0
    for parent, names in walk(folder):
        inner = Path(parent).relative_to(folder).parts
        if any(part.startswith(".") for part in inner) or _lies_in(parent, leave_out):
            continue
        for name in names:
            if name.startswith("."):
                continue
            path = Path(parent, name)
            kind = kind_of(path)
            if kind is None:
                others += 1
            else:
                files.append((_absolute(path), kind, _depth(path, base)))
    return files, others


def _named(path: Path, base: Path) -> File:
    # whoever names a file means it: one that is neither is read as an image, which says what is wrong with it
    return _absolute(path), kind_of(path) or "image", _depth(path, base)


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))


def _depth(path: Path, base: Path) -> int:
    return len(_absolute(path).parts) - len(_absolute(base).parts)


def _lies_in(path: str, folders: Collection[Path]) -> bool:
    return any(_absolute(Path(path)).is_relative_to(_absolute(folder)) for folder in folders)


def _names(depths: dict[Path, int]) -> dict[Path, str]:
    """A name for each file: its last parts, at first as many as ``depths`` says."""
    # how many would be called so; who is called so already, with its extension, counts too (a.jpg beside a.jpg.png)
    same = Counter([*(path.with_suffix("") for path in depths), *(path for path in depths if path.suffix)])
    whole = {path: path if same[path.with_suffix("")] > 1 else path.with_suffix("") for path in depths}
    lengths = dict(depths)
    while True:
        names = {path: "/".join(whole[path].parts[1:][-length:]) for path, length in lengths.items()}
        shared = _shared(names.values())
        if not shared:
            return names
        for path in lengths:
            lengths[path] += names[path] in shared


def _shared(names: Iterable[str]) -> set[str]:
    return {name for name, count in Counter(names).items() if count > 1}
