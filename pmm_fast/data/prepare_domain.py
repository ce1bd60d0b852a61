"""Converting a domain once to a folder that reads fast and needs no description: see ``prepare_domain``.

A folder is made as ``NAME.partial`` and gets its name when it is complete.  In it ``options.json`` says what it was
begun with, and ``prepared.json``, written last, what it holds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pmm_fast.config.schema import DataConfig
from pmm_fast.data.convert_files import PART, Images, PairWriter, remove_parts, write_whole
from pmm_fast.data.datasets import get_dataset
from pmm_fast.data.files import DataError
from pmm_fast.data.listing import Listing, list_domain
from pmm_fast.data.parallel import for_each, held
from pmm_fast.data.scan import OPTIONS, PARTIAL, PREPARED, Split, read_prepared
from pmm_fast.data.survey import Fault, known_count, listing_faults, restrict, root_of, sound_keys, space_faults

FORMAT = 1


@dataclass(frozen=True)
class Settings:
    """What is made of a domain.

    Attributes:
        label_space: of the written labels.
        splits: which of ``train`` and ``val``.
        images: what is done with images, see ``PairWriter``.
        quality: of ``jpeg``.
    """

    label_space: str
    splits: tuple[Split, ...]
    images: Images
    quality: int


@dataclass(frozen=True)
class Result:
    """What became of a domain.

    Attributes:
        folder: where it is, ``NAME.partial`` if it is not complete.
        counts: images in it, by split.
        faults: what is wrong with the originals.
        complete: it can be read.
        written: pairs that were written by this call.
    """

    folder: Path
    counts: dict[str, int]
    faults: list[Fault]
    complete: bool
    written: int


def list_splits(name: str, root: str, settings: Settings) -> dict[str, Listing]:
    """Find a domain.

    Args:
        name: of a data set (``gtav``, ``gtav:all``), of a generated domain, or a folder.
        root: folder below which data sets and relative folders lie.
        settings: which splits, and the label space to learn.

    Raises:
        DataError: it, or one of its splits, is not there.
    """
    config = DataConfig(root=root, label_space=settings.label_space)
    return {split: list_domain(name, config, split) for split in settings.splits}


def folder_name(listing: Listing) -> str:
    """The name of the folder that a domain is written to: that of the data set without its variant, else of its own
    folder."""
    return get_dataset(listing.dataset)[0].name if listing.dataset else Path(listing.name).name


def check_target(folder: Path, listings: Mapping[str, Listing]) -> None:
    """Refuse to write where originals are.

    Raises:
        DataError: the folder is that of the originals, or lies in it, or around it.
    """
    target = folder.resolve()
    for listing in listings.values():
        for original in (root_of(listing), listing.image_root, listing.label_root):
            source = original.resolve()
            if target == source or source in target.parents or target in source.parents:
                raise DataError(
                    f"--out: {folder} would mix with the originals of {listing.name} in {original}; "
                    "choose a folder outside"
                )


def prepare_domain(
    listings: Mapping[str, Listing], out: Path, settings: Settings, workers: int, skip_faulty: bool
) -> Result:
    """Write ``OUT/NAME`` with ``images/SPLIT`` and ``labels/SPLIT``, or what is missing of it.

    Args:
        listings: the domain, by split.
        out: folder of the prepared domains.
        settings: what is made of it.
        workers: processes.
        skip_faulty: leave faulty pairs out; otherwise a domain that has some is not completed, and what was left out of
            a complete one is tried again.

    Raises:
        DataError: the folder was begun with other options, is damaged, is none that was made here, or holds what the
            originals no longer do; or another run is at it.
        OSError: it cannot be written.
    """
    folder = out / folder_name(next(iter(listings.values())))
    check_target(folder, listings)
    options = _options(folder.name, listings, settings)
    by_name = [fault for listing in listings.values() for fault in listing_faults(listing)]
    partial = folder.with_name(folder.name + PARTIAL)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with held(folder.with_name(f".{folder.name}.lock"), folder):
        if folder.exists():
            _compare(folder, options)
            _refuse_strays(folder, listings, by_name, settings)
            # without the record, which somebody may have removed, it is as good as begun
            if (folder / PREPARED).exists():
                record = read_prepared(folder)
                skipped = [Fault(**fault) for fault in record.skipped]  # type: ignore[arg-type]
                if (skip_faulty or not skipped) and _is_whole(folder, listings, by_name, settings, skipped):
                    return Result(folder, record.counts, skipped, True, 0)
            if partial.exists():
                raise DataError(f"--out: there is {partial} beside {folder}: delete one of them")
            # from here on it is not complete; by name first, or a run that is killed would leave a folder of this name
            # that is none
            os.replace(folder, partial)
        elif _is_begun(partial):
            _compare(partial, options)
            _refuse_strays(partial, listings, by_name, settings)
        else:
            partial.mkdir(exist_ok=True)
            _write_json(partial / OPTIONS, options)
        (partial / PREPARED).unlink(missing_ok=True)
        return _fill(partial, folder, listings, by_name, options, settings, workers, skip_faulty)


def _fill(
    partial: Path,
    folder: Path,
    listings: Mapping[str, Listing],
    by_name: list[Fault],
    options: dict[str, Any],
    settings: Settings,
    workers: int,
    skip_faulty: bool,
) -> Result:
    remove_parts(partial)
    faults = list(by_name)
    written = 0
    for split, writer in _writers(listings, partial, settings, faults).items():
        found, new = _write_split(writer, listings[split], workers, f"{folder.name} {split}")
        faults += found
        written += new
    counts = {split: len(sound_keys(listing, faults)) for split, listing in listings.items()}
    # what is wrong with a whole split cannot be left out by name
    if any(not (skip_faulty and fault.name) for fault in faults):
        return Result(partial, counts, faults, False, written)
    if empty := [split for split, count in counts.items() if not count]:
        raise DataError(f"{folder.name}: no sound pair in {', '.join(empty)}")
    content = {
        **options,
        "lists": {split: Path(listing.list_name).name for split, listing in listings.items()},
        "counts": counts,
        "known": {split: known_count(listing) for split, listing in listings.items()},
        "left_out": {split: list(listing.left_out) for split, listing in listings.items()},
        "skipped": [asdict(fault) for fault in faults],
    }
    _write_json(partial / PREPARED, content)
    os.replace(partial, folder)
    return Result(folder, counts, faults, True, written)


def _write_split(writer: PairWriter, listing: Listing, workers: int, title: str) -> tuple[list[Fault], int]:
    """Write what is missing of a split; its faults, and how many pairs were written.

    Where anything is missing every pair is gone through: what an earlier run wrote tells, too, which ids labels hold.
    """
    faults: list[Fault] = []
    pixels, ids, new = np.zeros(256, np.int64), np.zeros(256, bool), 0
    for _, result in for_each(writer, list(range(len(writer.keys))), workers, title):
        faults += result.faults
        new += result.new
        if result.pixels is not None:
            pixels += result.pixels
        if result.ids is not None:
            ids |= result.ids
    return faults + space_faults(listing, pixels, ids), new


def _is_begun(partial: Path) -> bool:
    """Whether there is a folder with more in it than what a run that was killed at its very first file left."""
    return partial.exists() and any(not path.name.endswith(PART) for path in partial.iterdir())


def _is_whole(
    folder: Path, listings: Mapping[str, Listing], by_name: list[Fault], settings: Settings, skipped: list[Fault]
) -> bool:
    """Whether every pair of the originals is there as they are now, but for those that were left out."""
    known = {(fault.split, fault.name) for fault in skipped}
    if any((fault.split, fault.name) not in known for fault in by_name):
        return False
    writers = _writers(listings, folder, settings, by_name + skipped)
    return all(writer.done(index) for writer in writers.values() for index in range(len(writer.keys)))


def _refuse_strays(folder: Path, listings: Mapping[str, Listing], by_name: list[Fault], settings: Settings) -> None:
    """Refuse a folder that holds what the originals do not, or no longer, or under another extension.

    Raises:
        DataError: naming the first such file.
    """
    writers = _writers(listings, folder, settings, by_name)
    expected = {
        path for writer in writers.values() for index in range(len(writer.keys)) for path in writer.targets(index)
    }
    for split, listing in listings.items():
        for kind in ("images", "labels"):
            for path in sorted((folder / kind / split).rglob("*")):
                if path not in expected and not path.name.startswith(".") and not path.is_dir():
                    raise DataError(
                        f"{path}: no such pair in the originals of {listing.name} (any more); "
                        f"delete {folder} and prepare again"
                    )


def _writers(
    listings: Mapping[str, Listing], folder: Path, settings: Settings, faults: list[Fault]
) -> dict[str, PairWriter]:
    """The writer of each split, for every pair that no fault is about."""
    writers = {}
    for split, listing in listings.items():
        keys = sound_keys(listing, faults)
        if keys:
            domain = restrict(listing, keys)
            writers[split] = PairWriter(domain, split, keys, folder, settings.images, settings.quality)
    return writers


def _options(name: str, listings: Mapping[str, Listing], settings: Settings) -> dict[str, Any]:
    """What decides about the content of the folder; another call must agree in all of it."""
    first = next(iter(listings.values()))
    dataset, _, variant = first.dataset.partition(":")
    return {
        "format": FORMAT,
        "name": name,
        "dataset": dataset,
        "variant": variant,
        "layout": first.layout,
        "label_space": settings.label_space,
        "splits": list(settings.splits),
        "images": settings.images,
        "quality": settings.quality if settings.images == "jpeg" else None,
        "source": str(root_of(first).resolve()),
    }


def _compare(folder: Path, options: dict[str, Any]) -> None:
    path = folder / OPTIONS
    if not path.is_file():
        raise DataError(f"--out: {folder} exists and was not made by this program (there is no {OPTIONS} in it)")
    try:
        begun = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON: {error}; delete {folder} and prepare again") from error
    if not isinstance(begun, dict) or not options.keys() <= begun.keys():
        raise DataError(f"{path}: expected {', '.join(options)}; delete {folder} and prepare again")
    then, now = _in_words(begun), _in_words(options)
    differing = [f"{option} {then[option]}, now {value}" for option, value in now.items() if then[option] != value]
    if differing:
        raise DataError(
            f"{folder} was begun with {'; '.join(differing)}: give the same again, choose another --out, or delete it"
        )


def _in_words(options: Mapping[str, Any]) -> dict[str, str]:
    """What a call gave, or found, by option."""
    dataset, variant = options["dataset"], options["variant"]
    splits, quality = options["splits"], options["quality"]
    return {
        "--domains": (f"{dataset}:{variant}" if variant else str(dataset)) or str(options["name"]),
        "--label-space": str(options["label_space"]),
        "--splits": " ".join(map(str, splits)) if isinstance(splits, list) else str(splits),
        "--images": str(options["images"]) + ("" if quality is None else f" --quality {quality}"),
        "--root": str(options["source"]),
        "layout": str(options["layout"]),
        "format": str(options["format"]),
    }


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))
