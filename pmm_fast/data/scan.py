"""What a folder holds: its files by the name that an image shares with its label, which of them a list takes, and what
the record of a prepared folder says."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pmm_fast.data.datasets import DATASETS
from pmm_fast.data.files import IMAGE_SUFFIXES, DataError, walk
from pmm_fast.data.labels import SPACES
from pmm_fast.data.split_lists import read_list

Split = Literal["train", "val"]

SPLITS: tuple[Split, ...] = get_args(Split)
PREPARED = "prepared.json"
"""File at the top of a folder that ``pmm_fast.data.prepare`` completed: what it holds, see ``Prepared``."""
OPTIONS = "options.json"
"""File at the top of a folder that it began: with what options."""
PARTIAL = ".partial"
"""End of the name of a folder that it has not completed."""


@dataclass(frozen=True)
class Found:
    """Files below a folder.

    Attributes:
        files: by shared name: the path below the folder without extension and suffix, ``/``-separated, or only its
            last part.
        duplicates: names that two files have, with both; the first of them is in ``files``.
        others: number of files of the right kind that do not end with the suffix.
        kinds: number of files of each other extension, lower case.
    """

    files: dict[str, Path]
    duplicates: tuple[tuple[str, Path, Path], ...]
    others: int
    kinds: Mapping[str, int]


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

    Raises:
        DataError: a folder cannot be read.
    """
    found: dict[str, Path] = {}
    duplicates = []
    others = 0
    kinds: Counter[str] = Counter()
    for folder, files in walk(root):
        prefix = "" if by_stem or folder == str(root) else f"{Path(folder).relative_to(root).as_posix()}/"
        for file in files:
            stem, extension = os.path.splitext(file)
            if file.startswith("."):
                continue
            if extension.lower() not in extensions:
                kinds[extension.lower()] += 1
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
    return Found(found, tuple(duplicates), others, kinds)


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


# --- prepared folders ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prepared:
    """What ``PREPARED`` says of its folder.

    Attributes:
        format: version of the record.
        name: name of the folder.
        dataset: data set and variant, as ``datasets.get_dataset`` takes them; empty for a plain folder.
        layout: name of the layout of the originals.
        label_space: of the labels.
        splits: which of ``train`` and ``val`` are in it.
        images: what was done with images: ``link``, ``copy``, ``png`` or ``jpeg``.
        quality: of ``jpeg``; None for the others.
        source: folder of the originals.
        lists: file name of the list that was applied, by split; empty without one.
        counts: number of pairs, by split.
        left_out: names of the images that no list knows, by split.
        skipped: each fault for which a pair was left out, by kind, split, name, path and message.
    """

    format: int
    name: str
    dataset: str
    layout: str
    label_space: str
    splits: tuple[str, ...]
    images: str
    quality: int | None
    source: str
    lists: dict[str, str]
    counts: dict[str, int]
    left_out: dict[str, list[str]]
    skipped: list[dict[str, str]]


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, str) for entry in value)


def _by_split(value: Any, test: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and set(value) <= set(SPLITS) and all(map(test, value.values()))


def _is_fault(value: Any) -> bool:
    return isinstance(value, dict) and _texts(list(value.values())) and sorted(value) == sorted(_FAULT)


_FAULT = ("kind", "split", "name", "path", "message")
_TEXT: tuple[str, Callable[[Any], bool]] = ("a text", lambda value: isinstance(value, str))
_RECORD: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "format": ("a whole number", lambda value: type(value) is int),
    "name": _TEXT,
    "dataset": ("a known data set, or nothing", lambda value: value == "" or value in list(DATASETS)),
    "variant": _TEXT,
    "layout": _TEXT,
    "label_space": (f"one of {', '.join(SPACES)}", lambda value: value in list(SPACES)),
    "splits": (f"a list of {' and '.join(SPLITS)}", lambda value: _texts(value) and set(value) <= set(SPLITS)),
    "images": _TEXT,
    "quality": ("a whole number or null", lambda value: value is None or type(value) is int),
    "source": _TEXT,
    "lists": ("a text by split", lambda value: _by_split(value, _TEXT[1])),
    "counts": ("a whole number by split", lambda value: _by_split(value, lambda count: type(count) is int)),
    "left_out": ("a list of names by split", lambda value: _by_split(value, _texts)),
    "skipped": (
        f"a list of faults ({', '.join(_FAULT)})",
        lambda value: isinstance(value, list) and all(map(_is_fault, value)),
    ),
}


def is_begun(folder: Path) -> bool:
    """Whether ``OPTIONS`` is in the folder and is of ``pmm_fast.data.prepare``."""
    try:
        content = json.loads((folder / OPTIONS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and {"format", "label_space", "splits"} <= set(content)


def read_prepared(folder: Path) -> Prepared:
    """What the record at the top of a prepared folder says.

    Raises:
        DataError: it cannot be read, or is not as ``pmm_fast.data.prepare`` writes it.
    """
    path = folder / PREPARED
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a JSON object, got {content!r}")
    for key, (expected, test) in _RECORD.items():
        if key not in content or not test(content[key]):
            got = repr(content[key]) if key in content else "none"
            raise DataError(f"{path}: {key}: expected {expected}, got {got}")
    for key in ("lists", "counts", "left_out"):
        if missing := set(content["splits"]) - set(content[key]):
            raise DataError(f"{path}: {key}: expected an entry for {', '.join(sorted(missing))}, got {content[key]!r}")
    values = {key: content[key] for key in _RECORD if key != "variant"}
    if content["dataset"]:
        dataset, variant = DATASETS[content["dataset"]], content["variant"]
        if variant not in dataset.variants:
            raise DataError(f"{path}: variant: expected one of {', '.join(dataset.variants)}, got {variant!r}")
        values["dataset"] = dataset.full_name(variant)
    return Prepared(**values | {"splits": tuple(content["splits"])})
