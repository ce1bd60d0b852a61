"""``python -m pmm_fast.data.verify``: are the data that a protocol needs all there, and are they right?

python -m pmm_fast.data.verify /data --protocol gs
python -m pmm_fast.data.verify /data --domains cityscapes bdd100k --splits val --limit 200 --out report
python -m pmm_fast.data.verify --config my_town.yaml --out report
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from pmm_fast.config import Config, ConfigError, Parser, load_config, run_main
from pmm_fast.config.protocol import leave_one_out

if TYPE_CHECKING:
    from pmm_fast.data.listing import Split

PROG = "python -m pmm_fast.data.verify"
DESCRIPTION = (
    "Check the data sets of a protocol, file by file: that every split is complete, every image has its label, every "
    "file can be read, sizes agree, and labels hold the ids that they should.  Exits with 0 only if all that is needed "
    "is there and right, with 1 if not, with 2 after a wrong option."
)
PROTOCOLS = {"g": "gg_r50", "gs": "gs_r50", "gsi": "gsi_r50"}
"""Protocols of the field (sources by initial, tested on Cityscapes, BDD100K and Mapillary) and their presets."""

SPLITS = ("train", "val")


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, check, print the summary, write the files; exit with 1 if something is wrong.

    Raises:
        ValueError: a wrong option (``ConfigError``), an unknown domain, or one that does not map to the label space.
        SystemExit: something is missing or wrong.
    """
    own = _parser().parse_options(argv)[0]
    for name in ("limit", "workers"):
        if getattr(own, name) < (name == "workers"):
            raise ConfigError(f"--{name}: expected at least {int(name == 'workers')}, got {getattr(own, name)}")
    config, needed = requested(own.root, own.protocol, own.config, own.domains, own.label_space)
    # a domain of which nothing is looked at is neither right nor wrong
    wanted = {name: [split for split in splits if split in own.splits] for name, splits in needed.items()}
    needed = {name: splits for name, splits in wanted.items() if splits}
    if not needed:
        raise ConfigError(f"--splits {' '.join(own.splits)}: no domain is needed in it")
    out = Path(own.out).expanduser() if own.out else None
    if out:
        if out.exists() and not out.is_dir():
            raise ConfigError(f"--out: expected a folder, but {out} is a file")
        # before reading, which may take an hour
        out.mkdir(parents=True, exist_ok=True)
    from pmm_fast.data.verify_report import check_domains, contact_sheet_of, render, sheet_names, write_report

    reports = check_domains(needed, config.data, own.workers, own.limit)
    if left_out := [name for name in wanted if name not in needed]:
        print(f"not looked at, only needed in other splits: {', '.join(left_out)}\n")
    print(render(reports, config.data, bool(out)))
    if out:
        write_report(out / "report.json", reports, config.data)
        for report, file in zip(reports, sheet_names([report.name for report in reports]), strict=True):
            sheet = contact_sheet_of(report, config.data.label_space)
            if sheet is not None:
                sheet.save(out / file)
        print(f"written to {out}")
    if any(report.faults for report in reports):
        raise SystemExit(1)


def requested(
    root: str | None, protocol: str | None, file: str | None, domains: list[str] | None, label_space: str | None
) -> tuple[Config, dict[str, list[Split]]]:
    """The configuration to read with, and the splits that are needed of every domain.

    Sources of a protocol or configuration are trained and tested on, so both their splits are needed; unseen domains
    are only tested on.

    Args:
        root: folder of the data; None: ``data.root`` of the configuration.
        protocol: a key of ``PROTOCOLS``, or None.
        file: preset or YAML file, or None.
        domains: names, or None.
        label_space: classes to learn; None: those of the configuration.

    Raises:
        ValueError: a file that cannot be read, or an unknown label space.
    """
    preset = PROTOCOLS[protocol] if protocol else file
    config = leave_one_out(load_config(preset)) if preset else Config()
    if root is not None:
        config.data.root = root
    if label_space is not None:
        config.data.label_space = label_space
    if config.data.root and not Path(config.data.root).expanduser().is_dir():
        raise ConfigError(f"no such folder: {config.data.root}")
    from pmm_fast.data.labels import get_space

    get_space(config.data.label_space)
    if domains is None:
        # a domain that is both is a source
        unseen = [name for name in config.data.unseen if name not in config.data.sources]
        return config, _needing(config.data.sources, "train", "val") | _needing(unseen, "val")
    return config, _needing(domains, "train", "val")


def _needing(names: list[str], *splits: Split) -> dict[str, list[Split]]:
    return {name: list(splits) for name in names}


def _parser() -> Parser:
    parser = Parser(PROG, DESCRIPTION, sections=())
    parser.add_argument("root", nargs="?", metavar="ROOT", help="folder below which the data sets lie")
    what = parser.own.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--protocol",
        choices=tuple(PROTOCOLS),
        help="what the protocol needs: g: GTAV; gs: and SYNTHIA; gsi: and IDD; each tested on Cityscapes, BDD100K and "
        "Mapillary Vistas",
    )
    what.add_argument("--domains", nargs="+", metavar="NAME", help="data sets, or folders with images/ and labels/")
    what.add_argument("--config", metavar="NAME|FILE", help="what a preset or a YAML file needs")
    add = parser.own.add_argument
    add("--label-space", metavar="NAME", help="classes to learn [cityscapes19, or that of the configuration]")
    add("--splits", nargs="+", choices=SPLITS, default=SPLITS, help="look at these splits only")
    add("--limit", type=int, default=0, metavar="N", help="read N evenly spaced pairs a split at most; 0: all [0]")
    add("--out", metavar="DIR", help="write report.json and a contact sheet of every domain there")
    cores = os.cpu_count() or 1
    add("--workers", type=int, default=cores, metavar="N", help=f"processes [{cores}]")
    return parser


if __name__ == "__main__":
    run_main(main)
