"""Checking domains and saying what was found: as text, as JSON, and as a contact sheet of every domain."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pmm_fast.config.schema import DataConfig, DomainConfig
from pmm_fast.data.contact_sheet import SAMPLES, Sample, contact_sheet, percent
from pmm_fast.data.datasets import DATASETS, Dataset, dataset_names, find_folders, get_dataset
from pmm_fast.data.files import DataError
from pmm_fast.data.labels import IGNORE, get_space
from pmm_fast.data.listing import Listing, list_domain
from pmm_fast.data.scan import Split, read_prepared
from pmm_fast.data.survey import (
    Fault,
    Survey,
    evenly_spaced,
    known_count,
    many,
    named,
    restrict,
    root_of,
    survey_split,
)

FORMAT = 1
SHOWN = 20
_SIZES_SHOWN = 4
_INDENT = " " * 8


@dataclass
class DomainReport:
    """What was found of a domain.

    Attributes:
        name: the name it was asked for by.
        dataset: the data set that it is, None for another folder.
        needed: splits that were asked for.
        surveys: by split; only those that are there.
        missing: the faults of the others.
    """

    name: str
    dataset: Dataset | None
    needed: list[Split]
    surveys: dict[str, Survey] = field(default_factory=dict)
    missing: list[Fault] = field(default_factory=list)

    @property
    def faults(self) -> list[Fault]:
        """Everything that is wrong with it."""
        return self.missing + [fault for survey in self.surveys.values() for fault in survey.faults]

    @property
    def pixels(self) -> np.ndarray:
        """int64 ``[256]``, pixels of every class that is learnt, over its splits."""
        return np.sum([survey.pixels for survey in self.surveys.values()], axis=0, dtype=np.int64) + np.zeros(256, int)


def check_domains(
    needed: Mapping[str, list[Split]], config: DataConfig, workers: int, limit: int
) -> list[DomainReport]:
    """Look at domains, one after the other.

    Args:
        needed: the splits of every domain.
        config: where data lie and which label space is learnt.
        workers: processes.
        limit: pairs to read of a split; 0: all.

    Raises:
        DataError: a name that stands for no domain, or a domain whose labels do not map to the label space; before
            anything is read.
    """
    # all of them are listed before any is read, which may take an hour
    reports = []
    for name, splits in needed.items():
        report = DomainReport(name, _dataset_of(name, config), splits)
        for split in splits:
            listing = _list(report, config, split)
            if listing:
                report.surveys[split] = Survey(listing, [])
                report.dataset = get_dataset(listing.dataset)[0] if listing.dataset else report.dataset
        reports.append(report)
    for report in reports:
        for place, empty in report.surveys.items():
            survey = survey_split(empty.listing, workers, limit)
            _check_counts(survey)
            report.surveys[place] = survey
    return reports


def _list(report: DomainReport, config: DataConfig, split: Split) -> Listing | None:
    """The listing of a split; where there is nothing to list that is a finding, unless nobody could know the name."""
    try:
        return list_domain(report.name, config, split)
    except DataError as error:
        if not _is_known(report.name, config):
            raise
        report.missing.append(Fault("missing domain", split, "", "", str(error)))
        return None
    except ValueError as error:
        raise DataError(f"domain {report.name!r} with --label-space {config.label_space}: {error}") from error


def _is_known(name: str, config: DataConfig) -> bool:
    """Whether a name stands for a domain at all, be it there or not."""
    from pmm_fast.data.streets import STREETS

    if name in config.domains:
        return config.domains[name].dataset in ("", *dataset_names())
    if name.startswith("streets/"):
        return name.removeprefix("streets/") in STREETS
    folders = (Path(name).expanduser(), Path(config.root).expanduser() / name)
    return name in dataset_names() or any(folder.is_dir() for folder in folders if name)


def _check_counts(survey: Survey) -> None:
    """Compare the number of images with what is known of the data set, and with what was prepared."""
    listing, there = survey.listing, len(survey.listing.keys)
    known, where = known_count(listing), f"{there} images in {listing.image_root}"
    texts = []
    if listing.layout == "prepared":
        record = read_prepared(root_of(listing))
        survey.skipped = sorted({fault["name"] for fault in record.skipped if fault["split"] == listing.split})
        prepared = record.counts[listing.split]
        if prepared != there:
            texts.append(f"{where}, but {prepared} were prepared")
    expected = None if known is None else known - len(survey.skipped)
    if expected not in (None, there):
        less = f", less {named(survey.skipped, 'pair')} left out when it was prepared" if survey.skipped else ""
        texts.append(f"{where}, but {listing.dataset} has {known}{less}")
    survey.faults += [Fault("count", listing.split, "", str(listing.image_root), text) for text in texts]


def _dataset_of(name: str, config: DataConfig) -> Dataset | None:
    full_name = config.domains[name].dataset if name in config.domains else name
    return DATASETS.get(full_name.partition(":")[0])


# --- text ---------------------------------------------------------------------------------------------------------


def render(reports: Sequence[DomainReport], config: DataConfig, detailed: bool) -> str:
    """The summary.

    Args:
        reports: of every domain.
        config: that they were read with.
        detailed: whether a file names the faults that are too many to be shown here.
    """
    blocks = [_render_domain(report, config, detailed) for report in reports]
    columns = [(report.name, split, survey.pixels) for report in reports for split, survey in report.surveys.items()]
    if columns:
        blocks.append(_class_table(columns, config.label_space))
    wrong = {report.name: len(report.faults) for report in reports if report.faults}
    read = sum(len(survey.checked) for report in reports for survey in report.surveys.values())
    there = sum(len(survey.listing.keys) for report in reports for survey in report.surveys.values())
    extent = f"{read} of {there} pairs read"
    if wrong:
        domains = ", ".join(f"{name} ({many(number, 'fault')})" for name, number in wrong.items())
        blocks.append(f"WRONG: {domains}; {extent}")
    else:
        blocks.append(f"all there and right; {extent}")
    return "\n\n".join(blocks)


def _render_domain(report: DomainReport, config: DataConfig, detailed: bool) -> str:
    title = f": {report.dataset.title}" if report.dataset else ""
    lines = [f"{report.name}{title}"]
    for split in report.needed:
        if split in report.surveys:
            lines += _render_survey(report.surveys[split], detailed)
    # both splits of an absent data set are missing for one reason
    for reason in dict.fromkeys(fault.message for fault in report.missing):
        splits = [fault.split for fault in report.missing if fault.message == reason]
        lines += _render_missing(report, splits, reason, config)
    return "\n".join(lines)


def _render_missing(report: DomainReport, splits: Sequence[str], reason: str, config: DataConfig) -> list[str]:
    """What is missing and, of a data set, how much it is, where it is got from, and how it may lie."""
    dataset = report.dataset
    if dataset is None:
        return [f"  {' '.join(splits)}: MISSING: {reason}"]
    domain = config.domains.get(report.name, DomainConfig(dataset=report.name))
    absent = not domain.root and not find_folders(dataset, Path(config.root))
    variant = domain.dataset.partition(":")[2] or dataset.default_variant
    counts = [f"{dataset.counts[variant, split]} {split}" for split in splits if (variant, split) in dataset.counts]
    place = f"below {config.root}" if config.root else "anywhere (no folder of data is given)"
    names = f"in any case called one of {', '.join(dataset.folders)}"
    return [
        f"  {' '.join(splits)}: MISSING: " + (f"there is no folder of it {place}, {names}" if absent else reason),
        f"{_INDENT}needed: {' and '.join(counts)} images, {dataset.size}",
        f"{_INDENT}usually from: {dataset.source}",
        f"{_INDENT}its files may lie in one of these ways:",
        *(f"{_INDENT}  {layout.describe(splits[0])}" for layout in dataset.layouts),
    ]


def _render_survey(survey: Survey, detailed: bool) -> list[str]:
    listing = survey.listing
    known = known_count(listing)
    images = f"{many(len(listing.keys), 'image')}" + ("" if known is None else f" ({known} known)")
    common = survey.sizes.most_common()
    sizes = ", ".join(f"{width}x{height} ({number})" for (width, height), number in common[:_SIZES_SHOWN])
    if len(common) > _SIZES_SHOWN:
        sizes += f" and {len(common) - _SIZES_SHOWN} other sizes"
    lines = [f"  {listing.split:<6}{images}, {len(survey.checked)} read: {sizes or 'none'}"]
    encoding = f"{listing.label_format} of {listing.source_space}"
    lines.append(_INDENT + "; ".join([f"{listing.dataset or 'folder'}, labels: {encoding}", *listing.notes]))
    if listing.left_out:
        lines.append(f"{_INDENT}{named(listing.left_out, 'image')} on no list, left out")
    if survey.skipped:
        lines.append(f"{_INDENT}{named(survey.skipped, 'pair')} left out when it was prepared")
    if survey.unlabelled:
        lines.append(f"{_INDENT}{named(survey.unlabelled, 'label')} without a pixel of any class")
    if survey.faults:
        lines.append(f"{_INDENT}{many(len(survey.faults), 'FAULT')}")
    lines += [f"{_INDENT}{fault.kind}: {fault.message}" for fault in survey.faults[:SHOWN]]
    if len(survey.faults) > SHOWN:
        where = "all are in report.json" if detailed else "--out DIR writes them all to report.json"
        lines.append(f"{_INDENT}... and {len(survey.faults) - SHOWN} more; {where}")
    return lines


def _class_table(columns: Sequence[tuple[str, str, np.ndarray]], label_space: str) -> str:
    """The share of every class in every split, in percent."""
    space = get_space(label_space)
    names, title = [*space.classes, "ignored"], "share of pixels, %"
    first = max(len(name) for name in [*names, title])
    heads = [(Path(name).name, split) for name, split, _ in columns]
    widths = [max(len(name), len(split), 7) for name, split in heads]
    rows = [["", *(name for name, _ in heads)], [title, *(split for _, split in heads)]]
    for position, name in enumerate(names):
        index = IGNORE if position == space.num_classes else position
        shares = [pixels[index] / max(int(pixels.sum()), 1) for _, _, pixels in columns]
        rows.append([name, *(percent(share).removesuffix(" %") for share in shares)])
    return "\n".join(
        "  ".join([f"{row[0]:<{first}}", *(f"{cell:>{width}}" for cell, width in zip(row[1:], widths, strict=True))])
        for row in rows
    )


# --- files --------------------------------------------------------------------------------------------------------


def write_report(path: Path, reports: Sequence[DomainReport], config: DataConfig) -> None:
    """Write everything that was found as JSON: a mapping with ``ok`` and, for every domain, its splits and faults."""
    content = {
        "format": FORMAT,
        "root": config.root,
        "label_space": config.label_space,
        "ok": not any(report.faults for report in reports),
        "domains": [_domain_record(report, config.label_space) for report in reports],
    }
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _domain_record(report: DomainReport, label_space: str) -> dict[str, Any]:
    dataset = report.dataset
    return {
        "name": report.name,
        "dataset": dataset.name if dataset else "",
        "title": dataset.title if dataset else "",
        "source": dataset.source if dataset else "",
        "needed": report.needed,
        "missing": [asdict(fault) for fault in report.missing],
        "splits": {split: _survey_record(survey, label_space) for split, survey in report.surveys.items()},
    }


def _survey_record(survey: Survey, label_space: str) -> dict[str, Any]:
    listing, classes = survey.listing, get_space(label_space).classes
    return {
        "dataset": listing.dataset,
        "layout": listing.layout,
        "images_in": str(listing.image_root),
        "labels_in": str(listing.label_root),
        "label_format": listing.label_format,
        "source_space": listing.source_space,
        "notes": list(listing.notes),
        "images": len(listing.keys),
        "known": known_count(listing),
        "read": len(survey.checked),
        "sizes": {f"{width}x{height}": number for (width, height), number in survey.sizes.most_common()},
        "pixels": {name: int(number) for name, number in zip(classes, survey.pixels[: len(classes)], strict=True)},
        "ignored_pixels": int(survey.pixels[IGNORE]),
        "never": [name for name, number in zip(classes, survey.pixels[: len(classes)], strict=True) if not number],
        "left_out": list(listing.left_out),
        "skipped": survey.skipped,
        "labels_without_image": sorted(listing.labels.keys() - listing.images.keys()),
        "labels_without_class": survey.unlabelled,
        "faults": [asdict(fault) for fault in survey.faults],
    }


def sheet_names(names: Sequence[str]) -> list[str]:
    """The file names of domains' contact sheets, all different."""
    found: list[str] = []
    for name in names:
        # the end of a path tells more; a file's name has 255 bytes
        stem = re.sub(r"[^\w-]+", "_", name).strip("_")[-60:] or "domain"
        numbered = (stem if number == 1 else f"{stem}_{number}" for number in count(1))
        # some file systems take capitals for small letters
        taken = {other.casefold() for other in found}
        found.append(next(file for each in numbered if (file := f"{each}.png").casefold() not in taken))
    return found


def contact_sheet_of(report: DomainReport, label_space: str) -> Image.Image | None:
    """The contact sheet of a domain: evenly spaced sound samples of its splits; None where there are none."""
    samples = []
    for split, survey in report.surveys.items():
        faulty = {fault.name for fault in survey.faults}
        sound = [name for name in survey.checked if name not in faulty]
        keys = tuple(sound[index] for index in evenly_spaced(len(sound), SAMPLES // len(report.surveys)))
        if keys:
            domain = restrict(survey.listing, keys)
            samples += [Sample(f"{split}  {key}", *domain.load(index)) for index, key in enumerate(keys)]
    if not samples:
        return None
    space = get_space(label_space)
    facts = [
        f"{split}: {len(survey.listing.keys)} images in {survey.listing.image_root}, {len(survey.checked)} read, "
        f"{many(len(survey.faults), 'fault')}"
        for split, survey in report.surveys.items()
    ]
    title = report.name + (f": {report.dataset.title}" if report.dataset else "")
    pixels = report.pixels
    counts = [*pixels[: space.num_classes], pixels[IGNORE]]
    return contact_sheet(title, facts, samples, space, [float(count / pixels.sum()) for count in counts])
