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

from PIL import Image

from pmm_fast.data.folder import FolderDomain
from pmm_fast.data.survey import Fault, read_pair

Images = Literal["link", "copy", "jpeg", "png"]

PART = ".part"
"""End of the name of a file that is being written; it begins with a dot, which readers pass over."""

_SUFFIXES = {"jpeg": (".jpg", ".jpeg"), "png": (".png",)}


@dataclass(frozen=True)
class PairWriter:
    """Reads samples of a domain and writes them; called with the index of one, it returns its faults.

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
        """Whether both files of a sample are there; a link counts if it leads to the image that is there now."""
        image, labels = self.targets(index)
        if self.images == "link" and not (image.is_symlink() and os.readlink(image) == self._real(index)):
            return False
        return image.exists() and labels.exists()

    def __call__(self, index: int) -> list[Fault]:
        source = self.domain.pairs[index][0]
        image, labels, faults = read_pair(self.domain, self.split, self.keys[index], index)
        if image is None or labels is None or faults:
            return faults
        image_path, label_path = self.targets(index)
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
        return []

    def _encodes(self, source: Path) -> bool:
        return source.suffix.lower() not in _SUFFIXES.get(self.images, (source.suffix.lower(),))

    def _real(self, index: int) -> str:
        return os.path.realpath(self.domain.pairs[index][0])


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file so that it is either absent or whole.

    Args:
        path: the file; its folder is made.
        write: writes the path that it is given.

    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}{PART}")
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def remove_parts(folder: Path) -> None:
    """Remove what a run that was killed left half written."""
    for part in folder.rglob(f".*{PART}"):
        part.unlink()
