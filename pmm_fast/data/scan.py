"""Which files a folder holds, by the name that an image shares with its label, and which of them a list takes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pmm_fast.data.files import IMAGE_SUFFIXES
from pmm_fast.data.split_lists import read_list


@dataclass(frozen=True)
class Found:
    """Files below a folder.

    Attributes:
        files: by shared name: the path below the folder without extension and suffix, ``/``-separated, or only its
            last part.
        duplicates: names that two files have, with both; the first of them is in ``files``.
        others: number of files of the right kind that do not end with the suffix.
    """

    files: dict[str, Path]
    duplicates: tuple[tuple[str, Path, Path], ...]
    others: int


@dataclass(frozen=True)
class Selection:
    """What a list takes of the images on disk; attributes as in ``listing.Listing``."""

    keys: tuple[str, ...]
    absent: tuple[str, ...]
    absent_at: str
    left_out: tuple[str, ...]
    shared: Mapping[str, int]


def index_files(
    root: Path, extensions: tuple[str, ...], suffix: str, not_suffix: str = "", by_stem: bool = False
) -> Found:
    """Find the files below ``root``, hidden ones apart.

    Args:
        root: the folder; links to folders are followed.
        extensions: extensions that count, lower case.
        suffix: what a stem must end with; not a part of the shared name.
        not_suffix: stems that end so do not count; none if empty.
        by_stem: the folders below ``root`` are no part of the shared name.
    """
    found: dict[str, Path] = {}
    duplicates = []
    others = 0
    seen: set[str] = set()
    # data sets are often assembled from links to folders; `seen` ends a cycle of them
    for folder, children, files in os.walk(root, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            children.clear()
            continue
        seen.add(real)
        children.sort()
        prefix = "" if by_stem or folder == str(root) else f"{Path(folder).relative_to(root).as_posix()}/"
        for file in sorted(files):
            stem, extension = os.path.splitext(file)
            if file.startswith(".") or extension.lower() not in extensions:
                continue
            if not stem.endswith(suffix):
                others += 1
                continue
            if not_suffix and stem.endswith(not_suffix):
                continue
            path, key = Path(folder, file), prefix + stem.removesuffix(suffix)
            if key in found:
                duplicates.append((key, found[key], path))
            else:
                found[key] = path
    return Found(found, tuple(duplicates), others)


def select(images: Mapping[str, Path], lists: Mapping[str, Path], split: str, suffix: str) -> Selection:
    """Take the images that are on the list of a split.

    Args:
        images: the images on disk by shared name.
        lists: the list of each split for which there is one; only that of ``split`` need be.
        split: the split to take.
        suffix: of image files; a name on a list may have it or not.

    Returns:
        The selection; ``shared`` counts its images that are also on the list of another split.

    Raises:
        DataError: a list cannot be read or names nothing.
    """
    matched = {other: _match(path, images, suffix) for other, path in lists.items()}
    keys, absent = matched[split]
    known = set().union(*(names for names, _ in matched.values()))
    shared = {other: len(keys & names) for other, (names, _) in matched.items() if other != split}
    return Selection(
        keys=tuple(sorted(keys)),
        absent=tuple(absent),
        absent_at=next(iter(absent.values()), ""),
        left_out=tuple(sorted(images.keys() - known)),
        shared={other: count for other, count in shared.items() if count},
    )


def _match(path: Path, images: Mapping[str, Path], suffix: str) -> tuple[set[str], dict[str, str]]:
    """The shared names on a list, and the entries without an image, each with its place."""
    keys, absent = set(), {}
    for entry, place in read_list(path).items():
        stem, extension = os.path.splitext(entry)
        bare = stem if extension.lower() in IMAGE_SUFFIXES else entry
        key = next((k for k in (bare, bare.removesuffix(suffix)) if k in images), None)
        if key is None:
            absent[entry] = place
        else:
            keys.add(key)
    return keys, absent
