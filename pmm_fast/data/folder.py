"""Labelled domains: pairs of image and label files, and reading a pair.

``open_domain`` turns a name of the configuration into a ``FolderDomain``; ``FolderDomain.load`` reads one image with
its labels in the space that is learnt.  Whatever is wrong with the files raises ``DataError``, which names the file.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from pmm_fast.config.schema import DataConfig
from pmm_fast.data.files import DataError, EncodingError, LabelFormat, read_image, read_labels
from pmm_fast.data.listing import Listing, Split, list_domain

_MEND = "mend it, or leave it out with python -m pmm_fast.data.prepare --skip-faulty"
# names of left-out images that `describe` spells out
_SHOWN = 5


@dataclass(frozen=True)
class FolderDomain:
    """One labelled domain: pairs of image and label files, and how their labels are to be read.

    Attributes:
        name: the name it was opened by.
        pairs: (image path, label path) of every sample, sorted.
        label_format: how labels are written, see ``files.read_labels``.
        source_space: label space or id table of the files.
        target_space: label space that ``load`` returns.
        notes: facts about the folder that ``describe`` reports.
        dataset: data set and variant, such as ``gtav:released``; empty for a plain folder.
        left_out: names of images on disk that are on no list, neither that of this split nor of another.
    """

    name: str
    pairs: list[tuple[Path, Path]]
    label_format: LabelFormat
    source_space: str
    target_space: str
    notes: tuple[str, ...] = ()
    dataset: str = ""
    left_out: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.pairs)

    def load_image(self, index: int) -> Image.Image:
        """Read the image of one sample.

        Args:
            index: position in ``pairs``.

        Returns:
            The image (PIL, mode RGB, decoded).

        Raises:
            DataError: the file is missing, damaged or of the wrong kind.
            IndexError: no such sample.
        """
        return read_image(self.pairs[index][0])

    def load_labels(self, index: int, size: tuple[int, int] | None = None) -> np.ndarray:
        """Read the labels of one sample.

        Args:
            index: position in ``pairs``.
            size: (width, height) that the labels must have, that of the image; None: any.

        Returns:
            uint8 ``[H, W]``, in ``target_space`` (255: ignore).

        Raises:
            DataError: the file is missing, damaged, of the wrong kind, of another size, or holds values outside its
                label space.
            IndexError: no such sample.
        """
        image_path, label_path = self.pairs[index]
        try:
            labels = read_labels(label_path, self.label_format, self.source_space, self.target_space)
        except EncodingError as error:
            if not self.dataset:
                raise
            # options of the configuration do not help: those of a data set are fixed
            raise DataError(f"{error.found}; {_MEND}") from error
        if size is not None and labels.shape != size[::-1]:
            raise DataError(
                f"image and label differ in size: {image_path} is {size[0]}x{size[1]}, "
                f"{label_path} is {labels.shape[1]}x{labels.shape[0]}; "
                + (_MEND if self.dataset else f"{_MEND}, or with list_file")
            )
        return labels

    def load(self, index: int) -> tuple[Image.Image, np.ndarray]:
        """Read one sample.

        Args:
            index: position in ``pairs``.

        Returns:
            The image and its labels, of one size, as ``load_image`` and ``load_labels`` have them.

        Raises:
            DataError: as there.
            IndexError: no such sample.
        """
        image = self.load_image(index)
        return image, self.load_labels(index, image.size)

    def describe(self) -> str:
        """One line about the domain: number of images, data set, label encoding, and what is worth knowing about it."""
        parts = [f"{self.name}: {len(self)} images"]
        if self.dataset:
            parts.append(f"data set {self.dataset}")
        encoding = f"labels: {self.label_format} of {self.source_space}"
        parts.append(encoding + (f" -> {self.target_space}" if self.source_space != self.target_space else ""))
        line = "; ".join([", ".join(parts), *self.notes])
        if self.left_out:
            more = ", ..." if len(self.left_out) > _SHOWN else ""
            line += f"; {len(self.left_out)} images on disk are on no list: {', '.join(self.left_out[:_SHOWN])}{more}"
        return line


def open_domain(name: str, config: DataConfig, split: Split) -> FolderDomain:
    """The domain that ``name`` stands for; how it is found: ``listing.list_domain``.

    Args:
        name: the name, as in ``data.sources`` and ``data.unseen``.
        config: where data lie and which label space to learn.
        split: ``train`` or ``val``.

    Raises:
        DataError: nothing is known by that name (the nearest is suggested), or its files are not as described.
        ValueError: unknown split or label space, or no mapping from the label space of the files.
    """
    return open_listing(list_domain(name, config, split))


def open_listing(listing: Listing) -> FolderDomain:
    """The domain of a listing without faults.

    Raises:
        DataError: two files have one name, a name on the list has no image, or an image has no label.
    """
    where = f"domain {listing.name!r}"
    if listing.duplicates:
        first, second = listing.duplicates[0]
        kind = "image" if first in listing.images.values() else "label"
        raise DataError(f"{where}: two {kind} files for one name: {first} and {second}")
    if listing.absent:
        raise DataError(f"{where}: {_absent(listing)}")
    if missing := listing.unlabelled:
        raise DataError(
            f"{where}: {len(missing)} of {len(listing.keys)} images have no label, first: "
            f"{listing.images[missing[0]]}; expected {listing.expected_label(missing[0])}"
        )
    return FolderDomain(
        name=listing.name,
        pairs=[(listing.images[key], listing.labels[key]) for key in listing.keys],
        label_format=listing.label_format,
        source_space=listing.source_space,
        target_space=listing.target_space,
        notes=listing.notes,
        dataset=listing.dataset,
        left_out=listing.left_out,
    )


def _absent(listing: Listing) -> str:
    """What is said about names on a list that have no image."""
    entry, count = listing.absent[0], len(listing.absent)
    message = f"{listing.absent_at}: there is no image {entry!r}"
    if listing.dataset:
        message += (
            f" below {listing.image_root} ({count} of {count + len(listing.keys)} on the list are not there); "
            "to use only what is there, describe the folder under data.domains, with a list_file of its own"
        )
    else:
        near = difflib.get_close_matches(entry, listing.images, n=1)
        example = f" (an image there is called {min(listing.images)!r})"
        message += f"; did you mean {near[0]!r}?" if near else example
    return message
