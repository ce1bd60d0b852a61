"""What is wrong with the files of a domain, and what is in them.  Faults are collected, never raised."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from pmm_fast.data.datasets import get_dataset
from pmm_fast.data.files import DataError
from pmm_fast.data.folder import FolderDomain, open_listing
from pmm_fast.data.label_ids import ID_TABLES
from pmm_fast.data.labels import IGNORE, get_space, mapping
from pmm_fast.data.listing import Listing
from pmm_fast.data.parallel import for_each

FaultKind = Literal[
    # the domain, or a split of it, cannot be listed
    "missing domain",
    # the split's list names an image that is not there
    "missing image",
    # an image has no label
    "missing label",
    # two files go by one name
    "duplicate",
    # an image cannot be read
    "image",
    # a label cannot be read, or holds values of another label space
    "label",
    # image and label differ in size
    "size",
    # the split has another number of images than is known of it
    "count",
    # the labels look like those of another label space
    "label space",
]


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong.

    Attributes:
        kind: what is wrong.
        split: ``train`` or ``val``.
        name: what image and label have in common; empty where it is about the whole split.
        path: the file or folder; empty where there is none to name.
        message: what is wrong and what was expected, in a sentence.
    """

    kind: FaultKind
    split: str
    name: str
    path: str
    message: str


@dataclass
class Survey:
    """What was found in a split.

    Attributes:
        listing: where its files are and how they are named.
        faults: everything that is wrong.
        checked: names of the pairs that were read, sorted.
        sizes: (width, height) of an image to how many have it.
        pixels: int64 ``[256]``, pixels of every id of the space that is learnt.
        unlabelled: names of the labels without a pixel of any class that is learnt.
        ids: bool ``[256]``, what the files hold where they are 8-bit ids of the data set's own; else all False.
        skipped: names of the pairs that were left out when the folder was prepared.
    """

    listing: Listing
    faults: list[Fault]
    checked: list[str] = field(default_factory=list)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    pixels: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))
    unlabelled: list[str] = field(default_factory=list)
    ids: np.ndarray = field(default_factory=lambda: np.zeros(256, bool))
    skipped: list[str] = field(default_factory=list)


def listing_faults(listing: Listing) -> list[Fault]:
    """What is wrong by the names of the files alone: images that are listed but absent, images without label, and
    names that two files share."""
    keys = set(listing.keys)
    faults = [
        Fault("missing image", listing.split, name, "", f"{name} is on the list, but not below {listing.image_root}")
        for name in listing.absent
    ]
    for name in listing.unlabelled:
        image = str(listing.images[name])
        text = f"{image} has no label: expected {listing.expected_label(name)}"
        faults.append(Fault("missing label", listing.split, name, image, text))
    names = {path: name for files in (listing.images, listing.labels) for name, path in files.items()}
    for pair in listing.duplicates:
        name = next(names[path] for path in pair if path in names)
        if name in keys:
            text = f"two files for one name: {pair[0]} and {pair[1]}"
            faults.append(Fault("duplicate", listing.split, name, str(pair[1]), text))
    return faults


def sound_keys(listing: Listing, faults: list[Fault]) -> tuple[str, ...]:
    """The names of a listing that no fault is about."""
    faulty = {fault.name for fault in faults if fault.split == listing.split}
    return tuple(name for name in listing.keys if name not in faulty)


def restrict(listing: Listing, keys: tuple[str, ...]) -> FolderDomain:
    """The domain of those names alone, which must be sound."""
    return open_listing(replace(listing, keys=keys, absent=(), duplicates=()))


def read_pair(
    domain: FolderDomain, split: str, name: str, index: int
) -> tuple[Image.Image | None, np.ndarray | None, list[Fault]]:
    """Read one sample of a domain.

    Args:
        domain: the domain.
        split: of the domain, for the faults.
        name: of the sample, for the faults.
        index: of the sample.

    Returns:
        Image and labels as ``FolderDomain.load`` gives them, None for what cannot be read, and the faults.
    """
    image_path, label_path = domain.pairs[index]
    image = labels = None
    faults: list[Fault] = []
    try:
        image = domain.load_image(index)
    except DataError as error:
        faults.append(Fault("image", split, name, str(image_path), str(error)))
    try:
        labels = domain.load_labels(index)
    except DataError as error:
        faults.append(Fault("label", split, name, str(label_path), str(error)))
    if image is not None and labels is not None and labels.shape != (image.height, image.width):
        text = (
            f"{image_path} is {image.width}x{image.height}, its label {label_path} {labels.shape[1]}x{labels.shape[0]}"
        )
        faults.append(Fault("size", split, name, str(label_path), text))
    return image, labels, faults


def survey_split(listing: Listing, workers: int, limit: int = 0) -> Survey:
    """Look for everything that is wrong with a split: by name, then by reading files.

    Args:
        listing: the split.
        workers: processes.
        limit: read this many pairs at most, evenly spaced; 0: all.
    """
    survey = Survey(listing, listing_faults(listing))
    keys = sound_keys(listing, survey.faults)
    if not keys:
        return survey
    check = _Check(restrict(listing, keys), listing.split, keys)
    tasks = evenly_spaced(len(keys), limit)
    for index, found in for_each(check, tasks, workers, f"{listing.name} {listing.split}"):
        survey.checked.append(keys[index])
        survey.faults += found.faults
        if found.size is not None:
            survey.sizes[found.size] += 1
        if found.pixels is not None:
            survey.pixels += found.pixels
            if not found.pixels[:IGNORE].any():
                survey.unlabelled.append(keys[index])
        if found.ids is not None:
            survey.ids |= found.ids
    survey.faults += space_faults(listing, survey.pixels, survey.ids)
    return survey


@dataclass(frozen=True)
class _Found:
    size: tuple[int, int] | None
    pixels: np.ndarray | None
    ids: np.ndarray | None
    faults: list[Fault]


@dataclass(frozen=True)
class _Check:
    """Reads a sample of a domain by its index."""

    domain: FolderDomain
    split: str
    keys: tuple[str, ...]

    def __call__(self, index: int) -> _Found:
        image, labels, faults = read_pair(self.domain, self.split, self.keys[index], index)
        size = None if image is None else image.size
        if labels is None:
            return _Found(size, None, None, faults)
        return _Found(size, np.bincount(labels.ravel(), minlength=256), native_ids(self.domain, index), faults)


def native_ids(domain: FolderDomain, index: int) -> np.ndarray | None:
    """Which values a label file holds: bool ``[256]``; None where files are not 8-bit ids of a data set's own."""
    if domain.label_format != "ids" or domain.source_space not in ID_TABLES:
        return None
    with Image.open(domain.pairs[index][1]) as file:
        return np.array(file.histogram()) > 0


def known_count(listing: Listing) -> int | None:
    """How many images the data set has in this split, as far as is known."""
    if not listing.dataset:
        return None
    dataset, variant = get_dataset(listing.dataset)
    return dataset.counts.get((variant, listing.split))


def evenly_spaced(total: int, limit: int) -> list[int]:
    """At most ``limit`` of the indices below ``total``, evenly spaced and each from the middle of its share; 0: all."""
    if not 0 < limit < total:
        return list(range(total))
    return [(2 * i + 1) * total // (2 * limit) for i in range(limit)]


def space_faults(listing: Listing, pixels: np.ndarray, ids: np.ndarray) -> list[Fault]:
    """Whether the labels of a split, each of them valid, are together those of another label space.

    Labels without a pixel of any class are.  A data set's own ids never say 255, and reach beyond the train ids; so
    255, and nothing beyond the train ids, means that somebody converted the files.

    Args:
        listing: the split.
        pixels: int64 ``[256]``, pixels of every id of the space that is learnt.
        ids: bool ``[256]``, what ``native_ids`` gives for its files, joined.
    """
    if pixels.any() and not pixels[:IGNORE].any():
        text = f"no label below {listing.label_root} has a pixel of any class: is it {listing.source_space} at all?"
        return [Fault("label space", listing.split, "", str(listing.label_root), text)]
    seen = np.flatnonzero(ids)
    if IGNORE not in seen:
        return []
    learnt = ID_TABLES[listing.source_space].space
    highest = int(seen[seen != IGNORE].max(initial=0))
    # files that say the same in both are no matter
    if highest >= get_space(learnt).num_classes or (mapping(listing.source_space, learnt)[seen] == seen).all():
        return []
    text = (
        f"labels below {listing.label_root} say 255 and nothing beyond {highest}, so they are ids of {learnt}, but are "
        f"read as {listing.source_space}; describe the domain in a YAML file (data.domains), with label_space: {learnt}"
    )
    return [Fault("label space", listing.split, "", str(listing.label_root), text)]


def root_of(listing: Listing) -> Path:
    """The deepest folder that holds a split's images and labels."""
    return Path(os.path.commonpath([listing.image_root.absolute(), listing.label_root.absolute()]))


def many(number: int, noun: str) -> str:
    """A number and its noun, in the plural where it must be."""
    return f"{number} {noun}{'' if number == 1 else 'S' if noun.isupper() else 's'}"


def named(names: Sequence[str], noun: str) -> str:
    """``3 images (a, b, c)``, with the first few names of many."""
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{many(len(names), noun)} ({shown})"
