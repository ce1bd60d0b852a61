"""Labelled image folders: which image belongs to which label, and reading a pair.

``open_domain`` turns a name of the configuration into a ``FolderDomain``; ``FolderDomain.load`` reads one image with
its labels in the space that is learnt.  Whatever is wrong with the files raises ``DataError``, which names the file.
"""

from __future__ import annotations

import difflib
import os
import struct
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from pmm_fast.config.schema import DataConfig, DomainConfig
from pmm_fast.data.labels import IGNORE, INVALID, get_space, mapping, suggestion

Split = Literal["train", "val"]

SPLITS: tuple[Split, ...] = ("train", "val")
LISTS = Path(__file__).parent / "lists"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
LABEL_SUFFIXES = (".png",)
STREETS_VAL_IMAGES = 40
STREETS_SPACE = "cityscapes19"

# what Pillow's decoders raise on damaged files
_DECODER_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


class DataError(ValueError):
    """Something is wrong with the files of a domain; the message names the file or option and what was expected."""


@dataclass(frozen=True)
class FolderDomain:
    """One labelled domain: pairs of image and label files, and how their labels are to be read.

    Attributes:
        name: the name it was opened by.
        pairs: (image path, label path) of every sample, sorted.
        label_format: ``ids`` or ``colours``, see ``DomainConfig``.
        source_space: label space of the files.
        target_space: label space that ``load`` returns.
        notes: facts about the folder that ``describe`` reports.
    """

    name: str
    pairs: list[tuple[Path, Path]]
    label_format: Literal["ids", "colours"]
    source_space: str
    target_space: str
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.pairs)

    def load(self, index: int) -> tuple[Image.Image, np.ndarray]:
        """Read one sample.

        Args:
            index: position in ``pairs``.

        Returns:
            The image (PIL, mode RGB, decoded) and its labels, uint8 ``[H, W]``, in ``target_space`` (255: ignore).

        Raises:
            DataError: a file is missing, damaged, of the wrong kind, has other sizes than its partner, or holds values
                outside its label space.
            IndexError: no such sample.
        """
        image_path, label_path = self.pairs[index]
        image = read_image(image_path)
        if self.label_format == "colours":
            labels = _read_colours(label_path, self.source_space, self.target_space)
        else:
            labels = _read_ids(label_path, self.source_space, self.target_space)
        if labels.shape != (image.height, image.width):
            raise DataError(
                f"image and label differ in size: {image_path} is {image.width}x{image.height}, "
                f"{label_path} is {labels.shape[1]}x{labels.shape[0]}; leave it out with list_file or repair it"
            )
        return image, labels

    def describe(self) -> str:
        """One line about the domain: number of images, label encoding, and what is worth knowing about the folder."""
        labels = f"{self.label_format} of {self.source_space}"
        if self.source_space != self.target_space:
            labels += f" -> {self.target_space}"
        return "; ".join([f"{self.name}: {len(self)} images, labels: {labels}", *self.notes])


def open_domain(name: str, config: DataConfig, split: Split) -> FolderDomain:
    """Find the domain that ``name`` stands for and list its files.

    A name is, in this order: a key of ``config.domains``; ``streets/NAME``, a generated domain (made on first use);
    a folder (as it stands or below ``config.root``) with ``images/`` and ``labels/``, whose sub-folders ``train`` and
    ``val`` are used where they exist.

    Args:
        name: the name, as in ``data.sources`` and ``data.unseen``.
        config: where data lie and which label space to learn.
        split: ``train`` or ``val``.

    Raises:
        DataError: nothing is known by that name (the nearest is suggested), or its files are not as described.
        ValueError: unknown split or label space, or no mapping from the label space of the files.
    """
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
    if name in config.domains:
        return _open_configured(name, config.domains[name], config, split)
    if name.startswith("streets/"):
        return _open_streets(name, config, split)
    tried = [Path(name).expanduser(), *([Path(config.root).expanduser() / name] if config.root else [])]
    for folder in tried:
        if name and folder.is_dir():
            definition = DomainConfig(
                root=str(folder.resolve()),
                images=_split_folder(folder, "images", split),
                labels=_split_folder(folder, "labels", split),
            )
            return _open_configured(name, definition, config, split)
    known = [*config.domains, *(f"streets/{street}" for street in _street_names())]
    where = ", ".join(str(folder) for folder in tried)
    raise DataError(f"unknown domain {name!r}{suggestion(name, known)}; no such folder either: {where}")


def read_image(path: Path) -> Image.Image:
    """Read an image file.

    Returns:
        The decoded PIL image in mode RGB.

    Raises:
        DataError: it is missing, damaged, or a 16-bit single-channel image.
    """
    image, _ = _decode(path)
    if image.mode.startswith(("I", "F")):
        raise DataError(f"{path}: expected an 8-bit image, got mode {image.mode}; convert it to 8 bits a channel")
    return image if image.mode == "RGB" else image.convert("RGB")


# --- names to folders ---------------------------------------------------------------------------------------------


def _street_names() -> list[str]:
    from pmm_fast.data.streets import STREETS

    return sorted(STREETS)


def _open_streets(name: str, config: DataConfig, split: Split) -> FolderDomain:
    # here and not at the top: the generator is only needed by those who use it
    from pmm_fast.data.streets import ensure_streets

    street, names = name.removeprefix("streets/"), _street_names()
    if street not in names:
        raise DataError(f"unknown generated domain {name!r}{suggestion(name, [f'streets/{n}' for n in names])}")
    count = config.streets_images if split == "train" else STREETS_VAL_IMAGES
    height, width = config.streets_size
    cache = Path(config.cache).expanduser() if config.cache else None
    mapping(STREETS_SPACE, config.label_space)  # refuses before anything is drawn
    folder = ensure_streets(street, split, count, (height, width), cache)
    # by name and not by listing: the cache may hold more, from another run or one that is drawing now
    images, labels = folder / "images" / split, folder / "labels" / split
    pairs = [(images / f"{index:05d}.png", labels / f"{index:05d}.png") for index in range(count)]
    note = f"generated, {width}x{height}, images in {images}"
    return FolderDomain(name, pairs, "ids", STREETS_SPACE, config.label_space, (note,))


def _split_folder(root: Path, kind: str, split: Split) -> str:
    """``images/train`` where there are such folders, else ``images``."""
    if (root / kind / split).is_dir():
        return f"{kind}/{split}"
    # falling back to all images would mix training images into a test
    others = [other for other in SPLITS if (root / kind / other).is_dir()]
    if others:
        raise DataError(f"{root / kind} has a folder {others[0]!r} but none called {split!r}")
    return kind


def _open_configured(name: str, domain: DomainConfig, config: DataConfig, split: Split) -> FolderDomain:
    if not domain.root and not config.root:
        raise DataError(f"data.domains.{name}.root is empty, and so is data.root: expected the folder of the domain")
    if domain.label_format not in ("ids", "colours"):
        raise DataError(f"data.domains.{name}.label_format: expected ids or colours, got {domain.label_format!r}")
    source = domain.label_space or config.label_space
    mapping(source, config.label_space)  # refuses unknown spaces before any file is read
    root = Path(config.root).expanduser() / Path(domain.root.replace("{split}", split)).expanduser()
    hint = "" if config.root or root.is_absolute() else "; data.root is empty: is --data.root missing?"
    image_root = _existing(root / domain.images.replace("{split}", split), name, "images", hint)
    label_root = _existing(root / domain.labels.replace("{split}", split), name, "labels", hint)
    images = _index(image_root, IMAGE_SUFFIXES, domain.image_suffix, name, "image")
    labels = _index(label_root, LABEL_SUFFIXES, domain.label_suffix, name, "label")
    notes = [f"images in {image_root}"]
    if extra := len(labels.keys() - images.keys()):
        notes.append(f"{extra} labels have no image (first: {min(labels.keys() - images.keys())}), not used")
    keys = sorted(images)
    if domain.list_file:
        list_path = _find_list(domain.list_file.replace("{split}", split), root, name)
        keys = _read_list(list_path, images, domain.image_suffix, name)
        notes.append(f"list {list_path}")
    elif "{split}" not in domain.root + domain.images and split not in Path(domain.images).parts:
        notes.append("no split: train and val are the same images")
    missing = [key for key in keys if key not in labels]
    if missing:
        raise DataError(
            f"domain {name!r}: {len(missing)} of {len(keys)} images have no label, first: {images[missing[0]]}; "
            f"expected {label_root / (missing[0] + domain.label_suffix)}.png"
        )
    pairs = [(images[key], labels[key]) for key in keys]
    return FolderDomain(name, pairs, domain.label_format, source, config.label_space, tuple(notes))


def _existing(folder: Path, name: str, option: str, hint: str) -> Path:
    if not folder.is_dir():
        parent = next(p for p in folder.absolute().parents if p.is_dir())
        raise DataError(f"domain {name!r}: no folder {folder} for its {option} ({parent} exists){hint}")
    return folder


def _index(root: Path, extensions: tuple[str, ...], suffix: str, name: str, what: str) -> dict[str, Path]:
    """Files below ``root`` by their shared name: path below ``root`` without extension and suffix, ``/``-separated."""
    found: dict[str, Path] = {}
    others = 0
    seen: set[str] = set()
    # data sets are often assembled from links to folders; `seen` ends a cycle of them
    for folder, children, files in os.walk(root, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            children.clear()
            continue
        seen.add(real)
        for file in files:
            stem, extension = os.path.splitext(file)
            if file.startswith(".") or extension.lower() not in extensions:
                continue
            if not stem.endswith(suffix):
                others += 1
                continue
            path = Path(folder) / file
            key = (path.relative_to(root).parent / stem.removesuffix(suffix)).as_posix()
            if key in found:
                raise DataError(f"domain {name!r}: two {what} files for one name: {found[key]} and {path}")
            found[key] = path
    if not found:
        kinds = " ".join(extensions)
        hint = f"; {others} files do not end with {what}_suffix {suffix!r}" if others else ""
        raise DataError(f"domain {name!r}: no {what} files ({kinds}) below {root}{hint}")
    return found


def _find_list(list_file: str, root: Path, name: str) -> Path:
    given = Path(list_file).expanduser()
    for path in (root / given, LISTS / given):
        if path.is_file():
            return path
    shipped = sorted(path.name for path in LISTS.glob("*.txt"))
    raise DataError(
        f"data.domains.{name}.list_file: no file {root / given}, and no list of that name is part of the package"
        f"{suggestion(list_file, shipped)}"
    )


def _read_list(path: Path, images: dict[str, Path], suffix: str, name: str) -> list[str]:
    keys = set()
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        entry = line.strip().replace("\\", "/").removeprefix("./")
        if not entry or entry.startswith("#"):
            continue
        stem, extension = os.path.splitext(entry)
        bare = stem if extension.lower() in IMAGE_SUFFIXES else entry
        key = next((k for k in (bare, bare.removesuffix(suffix)) if k in images), None)
        if key is None:
            near = difflib.get_close_matches(bare, images, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f" (an image there is called {min(images)!r})"
            raise DataError(f"domain {name!r}: {path}, line {number}: there is no image {entry!r}{hint}")
        keys.add(key)
    if not keys:
        raise DataError(f"domain {name!r}: {path} names no image")
    return sorted(keys)


# --- reading files ------------------------------------------------------------------------------------------------


def _decode(path: Path) -> tuple[Image.Image, int]:
    """The decoded image and, for a PNG, its bits a channel (8 for other formats)."""
    try:
        with open(path, "rb") as file:
            head = file.read(25)
            file.seek(0)
            image = Image.open(file)
            image.load()
    except _DECODER_ERRORS as error:
        raise DataError(f"{path}: cannot be read as an image: {error}") from error
    return image, head[24] if head.startswith(b"\x89PNG") else 8


def _decode_label(path: Path) -> Image.Image:
    image, depth = _decode(path)
    # Pillow reads 16-bit RGB as its high bytes, which would turn every id into 0
    if depth == 16 or image.mode.startswith("I"):
        raise DataError(f"{path}: expected an 8-bit label, got 16 bits; convert it to 8-bit ids (one channel) first")
    return image


def _read_ids(path: Path, source: str, target: str) -> np.ndarray:
    image = _decode_label(path)
    if image.mode not in ("L", "P"):
        hint = "; for labels in colours set label_format: colours" if image.mode in ("RGB", "RGBA") else ""
        raise DataError(f"{path}: expected one 8-bit channel of ids (mode L or P), got mode {image.mode}{hint}")
    raw = np.asarray(image)
    labels = _id_table(source, target).take(raw)
    bad = labels == INVALID
    if bad.any():
        values = np.unique(raw[bad])
        shown = ", ".join(map(str, values[:8])) + (", ..." if len(values) > 8 else "")
        last = get_space(source).num_classes - 1
        raise DataError(
            f"{path}: values {shown} in {int(bad.sum())} pixels are no ids of label space {source!r} "
            f"(0..{last}, {IGNORE} for ignore)"
        )
    return labels


def _read_colours(path: Path, source: str, target: str) -> np.ndarray:
    image = _decode_label(path)
    if image.mode == "P":
        return _palette_table(image, source, target).take(np.asarray(image))
    if image.mode not in ("RGB", "RGBA"):
        hint = "; for labels in ids set label_format: ids" if image.mode == "L" else ""
        raise DataError(f"{path}: expected colours (mode RGB or palette), got mode {image.mode}{hint}")
    # four bytes a pixel make one integer a pixel, in one pass
    pixels = np.asarray(image if image.mode == "RGBA" else image.convert("RGBX")).view("<u4")[..., 0]
    return _colour_table(source, target).take(pixels & 0xFFFFFF)


@lru_cache(maxsize=8)
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
