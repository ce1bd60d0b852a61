"""``python -m pmm_fast.data.prepare``: convert data sets once to 8-bit labels of the classes that are learnt.

python -m pmm_fast.data.prepare --root /data --out /prepared --domains gtav synthia idd
python -m pmm_fast.data.prepare --root /data --out /prepared --domains gtav:all --images jpeg
python -m pmm_fast.train --config gs_r50 --data.root /prepared
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pmm_fast.config import ConfigError, Parser, run_main

if TYPE_CHECKING:
    from pmm_fast.data.prepare_domain import Result, Settings

PROG = "python -m pmm_fast.data.prepare"
DESCRIPTION = (
    "Convert data sets once to folders of images and 8-bit labels of the classes that are learnt, which are read fast "
    "and need no description.  Originals are never touched.  A run that was stopped goes on where it was when it is "
    "called again.  Exits with 1, and leaves NAME.partial, when files of a data set are missing or wrong."
)
IMAGES = ("link", "copy", "jpeg", "png")
QUALITY = 95


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and prepare one domain after the other; exit with 1 if one is faulty.

    Raises:
        ValueError: a wrong option, or a domain that is not there (``ConfigError``, ``DataError``).
        OSError: a file cannot be written.
        SystemExit: files of a domain are missing or wrong; all of them have been named.
    """
    own = _parser().parse_options(argv)[0]
    if own.quality is not None and own.images != "jpeg":
        raise ConfigError(f"--quality is for --images jpeg, not for {own.images}")
    quality = QUALITY if own.quality is None else own.quality
    if not 1 <= quality <= 100:
        raise ConfigError(f"--quality: expected 1..100, got {quality}")
    if own.workers < 1:
        raise ConfigError(f"--workers: expected at least 1, got {own.workers}")
    from pmm_fast.data.listing import SPLITS
    from pmm_fast.data.prepare_domain import Settings

    # in their own order and once each, however this call writes them
    splits = tuple(split for split in SPLITS if split in own.splits)
    settings = Settings(own.label_space, splits, own.images, quality)
    prepare(own.domains, own.root, Path(own.out).expanduser(), settings, own.workers, own.skip_faulty)


def _parser() -> Parser:
    parser = Parser(PROG, DESCRIPTION, sections=())
    add = parser.own.add_argument
    add("--root", default="", metavar="DIR", help="folder below which the data sets lie")
    add("--out", required=True, metavar="DIR", help="folder to write to; each domain gets one of its own in it")
    add(
        "--domains",
        required=True,
        nargs="+",
        metavar="NAME",
        help="data sets (gtav, gtav:all, synthia, cityscapes, ...), or folders with images/ and labels/",
    )
    add("--label-space", default="cityscapes19", metavar="NAME", help="classes to learn [cityscapes19]")
    add("--splits", nargs="+", choices=("train", "val"), default=("train", "val"), help="which splits [train val]")
    add(
        "--images",
        choices=IMAGES,
        default="link",
        help="link: symbolic links to the originals, which must stay where they are; copy: as they are; jpeg, png: "
        "encoded anew unless they are in that format [link]",
    )
    add("--quality", type=int, metavar="N", help=f"of --images jpeg, 1..100 [{QUALITY}]")
    cores = os.cpu_count() or 1
    add("--workers", type=int, default=cores, metavar="N", help=f"processes [{cores}]")
    add(
        "--skip-faulty",
        action="store_true",
        help="leave faulty pairs out, by name, and complete the folder; without it they are tried again",
    )
    return parser


def prepare(names: list[str], root: str, out: Path, settings: Settings, workers: int, skip_faulty: bool) -> None:
    """Prepare domains and say what became of them.

    Args:
        names: the domains.
        root: folder below which they lie.
        out: folder to write to.
        settings: what is made of them.
        workers: processes.
        skip_faulty: leave faulty pairs out.

    Raises:
        DataError: a domain is not there, or its folder in ``out`` cannot be used.
        SystemExit: with 1, if a domain is faulty; the others are prepared nevertheless.
    """
    from pmm_fast.data.files import DataError
    from pmm_fast.data.prepare_domain import check_target, folder_name, list_splits, prepare_domain
    from pmm_fast.data.survey import known_count, named

    # everything that can be refused is refused before the first hour of work
    if out.exists() and not out.is_dir():
        raise DataError(f"--out: expected a folder, but {out} is a file")
    if root and out.exists() and os.path.samefile(root, out):
        raise DataError(f"--out: {out} is --root too; prepared folders there would be taken for originals")
    found = {name: list_splits(name, root, settings) for name in names}
    targets: dict[str, str] = {}
    for name, listings in found.items():
        target = folder_name(next(iter(listings.values())))
        if target in targets:
            raise DataError(f"--domains: {targets[target]} and {name} would both be written to {out / target}")
        targets[target] = name
        check_target(out / target, listings)
    incomplete = []
    for listings in found.values():
        for listing in listings.values():
            print(f"{listing.name} {listing.split}: {'; '.join(listing.notes)}", file=sys.stderr)
            if listing.left_out:
                print(f"  {named(listing.left_out, 'image')} on no list, not prepared", file=sys.stderr)
            known, there = known_count(listing), len(listing.keys)
            if known not in (None, there):
                print(
                    f"warning: {listing.dataset} {listing.split} has {known} images, here are {there}", file=sys.stderr
                )
        result = prepare_domain(listings, out, settings, workers, skip_faulty)
        print(describe(result))
        if not result.complete:
            incomplete.append(result)
    if incomplete:
        folders = ", ".join(str(result.folder) for result in incomplete)
        print(
            f"error: faulty originals, {folders} left incomplete: mend them and call this again, or leave single "
            "pairs out with --skip-faulty",
            file=sys.stderr,
        )
        raise SystemExit(1)
    print(f"read them with  --data.root {out}")


def describe(result: Result) -> str:
    """What became of a domain, every fault by name."""
    counts = ", ".join(f"{count} {split}" for split, count in result.counts.items())
    if result.complete:
        lines = [f"{result.folder}: {counts}; {result.written} written now"]
    else:
        lines = [f"{result.folder}: {len(result.faults)} faults; {counts} are sound"]
    left_out = "left out, " if result.complete else ""
    lines += [f"  {left_out}{fault.kind}: {fault.message}" for fault in result.faults]
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main)
