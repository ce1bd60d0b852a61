"""One image and its labels written anew: 8-bit labels of the space that is learnt, the image linked, copied or encoded.

A file appears under its name only when it is whole: it is written beside it and then renamed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from pmm_fast.data.files import read_labels
from pmm_fast.data.folder import FolderDomain
from pmm_fast.data.survey import Fault, native_ids, read_pair

Images = Literal["link", "copy", "jpeg", "png"]

PART = ".part"
"""End of the name of a file that is being written; it begins with a dot, which readers pass over."""

_SUFFIXES = {"jpeg": (".jpg", ".jpeg"), "png": (".png",)}


@dataclass(frozen=True)
class Written:
    """One pair.

    Attributes:
        name: of the pair.
        faults: what is wrong with the originals; nothing is written of them then.
        new: it was written now, and not by an earlier run.
        pixels: int64 ``[256]``, pixels of every id of the written labels; None with faults.
        ids: bool ``[256]``, see ``survey.native_ids``.
    """

    name: str
    faults: list[Fault]
    new: bool = False
    pixels: np.ndarray | None = None
    ids: np.ndarray | None = None


@dataclass(frozen=True)
class PairWriter:
    """Reads samples of a domain and writes them, each by its index; what is done already is not written again.

    Attributes:
        domain: what is read, its ``target_space`` that of the written labels.
        split: of the domain, for faults.
        keys: name of each sample.
        folder: below it, the files are ``images/SPLIT/NAME.*`` and ``labels/SPLIT/NAME.png``.
        images: ``link``: symbolic links to the absolute path; ``copy``: byte for byte; ``jpeg``, ``png``: encoded,
            unless they are in that format already, then copied.
        quality: of ``jpeg``, 1..100.
    """

    domain: FolderDomain
    split: str
    keys: tuple[str, ...]
    folder: Path
    images: Images
    quality: int

    def targets(self, index: int) -> tuple[Path, Path]:
        """Where the image and the labels of a sample are written."""
        source, key = self.domain.pairs[index][0], self.keys[index]
        suffix = _SUFFIXES[self.images][0] if self._encodes(source) else source.suffix
        return self.folder / f"images/{self.split}/{key}{suffix}", self.folder / f"labels/{self.split}/{key}.png"

    def done(self, index: int) -> bool:
        """Whether both files of a sample are there, and no older than the originals; a link counts if it leads to the
        image that is there now."""
        image, labels = self.targets(index)
        source, source_labels = self.domain.pairs[index]
        if not _is_newer(labels, source_labels):
            return False
        if self.images == "link":
            return image.is_symlink() and os.readlink(image) == self._real(index) and image.exists()
        return _is_newer(image, source)

    def __call__(self, index: int) -> Written:
        name, source = self.keys[index], self.domain.pairs[index][0]
        image_path, label_path = self.targets(index)
        if self.done(index):
            space = self.domain.target_space
            pixels = np.bincount(read_labels(label_path, "ids", space, space).ravel(), minlength=256)
            return Written(name, [], False, pixels, native_ids(self.domain, index))
        # whatever was written of other originals is not of these
        for path in (image_path, label_path):
            path.unlink(missing_ok=True)
        image, labels, faults = read_pair(self.domain, self.split, name, index)
        if image is None or labels is None or faults:
            return Written(name, faults)
        # 1 reads back faster than Pillow's 6: a label map is hardly larger, and less of it refers far back
        write_whole(label_path, lambda part: Image.fromarray(labels).save(part, "PNG", compress_level=1))
        if self.images == "link":
            write_whole(image_path, lambda part: os.symlink(self._real(index), part))
        elif not self._encodes(source):
            write_whole(image_path, lambda part: shutil.copyfile(source, part))
        elif self.images == "jpeg":
            write_whole(image_path, lambda part: image.save(part, "JPEG", quality=self.quality))
        else:
            write_whole(image_path, lambda part: image.save(part, "PNG"))
        return Written(name, [], True, np.bincount(labels.ravel(), minlength=256), native_ids(self.domain, index))

    def _encodes(self, source: Path) -> bool:
        return source.suffix.lower() not in _SUFFIXES.get(self.images, (source.suffix.lower(),))

    def _real(self, index: int) -> str:
        return os.path.realpath(self.domain.pairs[index][0])


def _is_newer(path: Path, original: Path) -> bool:
    """Whether a file is there and no older than what it was made of."""
    return path.exists() and path.stat().st_mtime_ns >= original.stat().st_mtime_ns


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file so that it is either absent or whole.

    Args:
        path: the file; its folder is made.
        write: writes the path that it is given.

    Raises:
        OSError: it cannot be written, with its name; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}{PART}")
    try:
        write(part)
        os.replace(part, path)
    except OSError as error:
        # a full disk is told by what writes into an open file, which knows no name; the part's means nothing to anybody
        if error.filename not in (None, str(part)):
            raise
        if error.errno is None:
            raise OSError(f"{path}: cannot be written: {error}") from error
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        part.unlink(missing_ok=True)


def remove_parts(folder: Path) -> None:
    """Remove what a run that was killed left half written."""
    for part in folder.rglob(f".*{PART}"):
        part.unlink()
