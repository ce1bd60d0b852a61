"""What ``python bench/memory_ops.py`` says: the rows, the files, the picture, and what was asked beside what was found.

A record is a dictionary with the keys of ``KEYS``, in the units that their names have; None where nothing was measured.
"""

from __future__ import annotations

import csv
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.cases import BASELINES, Case, Work, all_cases, work
from bench.harness import Measured, Rates

Record = dict[str, Any]

KEYS = (
    "op",
    "size",
    "dtype",
    "backend",
    "pass",
    "median_ms",
    "p20_ms",
    "p80_ms",
    "extra_peak_bytes",
    "bytes_moved",
    "bandwidth_share",
    "ratio_released",
    "ratio_reference",
    "ratio_compiled",
)


def records_of(case: Case, measured: dict[str, Measured], passes: list[str], rates: Rates) -> list[Record]:
    """A record for every implementation and pass of a case; a ratio is the baseline's median over the row's."""
    records = []
    for name, found in measured.items():
        for which in passes:
            if which not in found.seconds:
                continue
            median, moved = found.percentile(which, 50), work(case, which).moved
            record: Record = {"op": case.op, "size": case.size, "dtype": case.dtype, "backend": name, "pass": which}
            for key, percent in (("median_ms", 50), ("p20_ms", 20), ("p80_ms", 80)):
                record[key] = found.percentile(which, percent) * 1e3
            record["extra_peak_bytes"] = found.peak_bytes.get(which)
            record["bytes_moved"] = moved
            record["bandwidth_share"] = moved / median / rates.bandwidth
            for baseline in BASELINES:
                other = measured.get(baseline)
                known = other is not None and which in other.seconds
                record[f"ratio_{baseline}"] = other.percentile(which, 50) / median if other and known else None
            records.append(record)
    return records


HEADER = (
    f"{'operator':<23}{'size':<11}{'dtype':<8}{'backend':<14}{'pass':<8}{'ms':>9}{'p20':>9}{'p80':>9}"
    f"{'peak MB':>9}{'moved MB':>9}{'copy':>6}{'released':>10}{'reference':>10}{'compiled':>9}"
)
LEGEND = (
    "ms: median. peak MB: allocated above the start of the pass. moved MB: the least that must move (docs/ops);\n"
    "copy: its share of the measured copy bandwidth. released, reference, compiled: how many times faster than these."
)


def row(record: Record) -> str:
    """A line of the table."""
    text = f"{record['op']:<23}{record['size']:<11}{record['dtype']:<8}{record['backend']:<14}{record['pass']:<8}"
    for key in ("median_ms", "p20_ms", "p80_ms"):
        text += f"{record[key]:>9.{3 if record[key] < 1000 else 0}f}"
    peak = record["extra_peak_bytes"]
    text += f"{'' if peak is None else f'{peak / 1e6:.1f}':>9}{record['bytes_moved'] / 1e6:>9.1f}"
    text += f"{record['bandwidth_share']:>6.0%}"
    for baseline, width in zip(BASELINES, (10, 10, 9), strict=True):
        ratio = record[f"ratio_{baseline}"]
        text += f"{'' if ratio is None else f'{ratio:.2f}x':>{width}}"
    return text


def write_json(path: str, records: list[Record]) -> None:
    """The records as a list; the file is replaced at once, so that it can be read while the bench runs."""
    beside = Path(f"{path}.part")
    beside.write_text(json.dumps(records, indent=1) + "\n")
    os.replace(beside, path)


def write_csv(path: str, records: list[Record]) -> None:
    """The records as a table with a header."""
    with Path(path).open("w", newline="") as file:
        writer = csv.DictWriter(file, list(records[0]) if records else KEYS)
        writer.writeheader()
        writer.writerows(records)


@dataclass(frozen=True)
class Target:
    """A figure that was asked for: ``quantity`` of a case's pass is at least, or at most, ``asked``."""

    op: str
    size: str
    which: str
    quantity: str  # "released", "separate": times faster; "memory": share of released; "copy"; "bwd": multiple of bwd
    asked: float

    @property
    def at_most(self) -> bool:
        return self.quantity in ("memory", "bwd")

    def met(self, found: float) -> bool:
        return found <= self.asked if self.at_most else found >= self.asked


def _targets(op: str, size: str, forward: float, both: float, memory: float | None, over: str) -> list[Target]:
    speed = [Target(op, size, "fwd", over, forward), Target(op, size, "fwd+bwd", over, both)]
    second = [Target(op, size, "bwd2", "bwd", 3)]
    return speed + ([] if memory is None else [Target(op, size, "fwd+bwd", "memory", memory)]) + second


TARGETS_CPU = (
    *_targets("masked_average_pool", "paper", 150, 80, 0.02, "released"),
    *_targets("memory_read", "paper", 8, 8, 0.4, "released"),
    *_targets("memory_pass", "paper/one", 1.3, 1.2, None, "separate"),
    *_targets("upsample_cross_entropy", "paper/192", 6, 6, 0.03, "released"),
    *_targets("upsample_cross_entropy", "paper/48", 6, 6, 0.03, "released"),
)
TARGETS_GPU = (
    *_targets("masked_average_pool", "paper", 20, 20, None, "released"),
    *_targets("upsample_cross_entropy", "paper/192", 10, 10, None, "released"),
    *_targets("upsample_cross_entropy", "paper/48", 10, 10, None, "released"),
    *(
        Target(op, size, which, "copy", 0.75)
        for op, size in (("masked_average_pool", "fill"), ("memory_read", "fill"), ("memory_pass", "fill/one"))
        for which in ("fwd", "bwd")
    ),
    *(
        Target(op, size, "bwd2", "bwd", 3)
        for op, size in (("memory_read", "paper"), ("memory_pass", "paper/one"), ("memory_pass", "paper/two"))
    ),
)


def find_quantity(target: Target, backend: str, records: dict[tuple[str, ...], Record]) -> float | None:
    """What was found for a target, or None where a row that it needs is not there."""

    def look(name: str, which: str) -> Record | None:
        return records.get((target.op, target.size, "float32", name, which))

    mine = look(backend, target.which)
    if mine is None:
        return None
    if target.quantity == "copy":
        return mine["bandwidth_share"]
    if target.quantity == "bwd":
        other = look(backend, "bwd")
        return None if other is None else mine["median_ms"] / other["median_ms"]
    other = look(f"{backend}, separate" if target.quantity == "separate" else "released", target.which)
    if other is None:
        return None
    if target.quantity == "memory":
        return mine["extra_peak_bytes"] / other["extra_peak_bytes"]
    return other["median_ms"] / mine["median_ms"]


def floor_seconds(least: Work, rates: Rates) -> float:
    """No implementation that does this work can be faster: the slowest of its three parts at the measured rates."""
    return max(least.moved / rates.bandwidth, least.exponentials / rates.exponentials, least.products / rates.products)


def describe_floor(case: Case, which: str, median_ms: float, rates: Rates) -> str:
    """How near a pass came to the least time that its work takes."""
    least = work(case, which)
    parts = [f"{least.moved / 1e6:.1f} MB take {least.moved / rates.bandwidth * 1e3:.2f} ms"]
    if least.exponentials:
        took = least.exponentials / rates.exponentials * 1e3
        parts.append(f"{least.exponentials / 1e6:.1f} M exponentials {took:.2f} ms")
    if least.products:
        parts.append(f"{least.products / 1e6:.0f} M multiply-adds {least.products / rates.products * 1e3:.2f} ms")
    floor = floor_seconds(least, rates) * 1e3
    return f"took {median_ms:.2f} ms, {median_ms / floor:.1f}x the floor of {floor:.2f} ms ({', '.join(parts)})"


QUANTITIES = {
    "released": "times faster than released",
    "separate": "times faster than separate calls",
    "memory": "peak memory, share of released",
    "copy": "share of the copy bandwidth",
    "bwd": "time, multiple of bwd",
}


def target_lines(records: list[Record], backends: list[str], device: str, rates: Rates) -> list[str]:
    """Asked and found, for every target whose rows were measured, with the floor beside what was missed."""
    by_key = {tuple(r[key] for key in ("op", "size", "dtype", "backend", "pass")): r for r in records}
    cases = {(case.op, case.size): case for case in all_cases() if case.dtype == "float32"}
    lines = []
    for backend in backends:
        for target in TARGETS_GPU if device == "cuda" else TARGETS_CPU:
            found = find_quantity(target, backend, by_key)
            if found is None:
                continue
            form = "{:.1%}" if target.quantity in ("memory", "copy") else "{:.2f}x"
            verdict = "met" if target.met(found) else "MISSED"
            name = f"{backend} {target.op} {target.size} {target.which}"
            asked = f"{'<=' if target.at_most else '>='} {form.format(target.asked)}"
            lines.append(f"{name:<52}{QUANTITIES[target.quantity]:<34}{asked:>11}{form.format(found):>10}  {verdict}")
            if verdict == "MISSED" and target.quantity != "memory":
                mine = by_key[target.op, target.size, "float32", backend, target.which]
                case = cases[target.op, target.size]
                lines.append("    " + describe_floor(case, target.which, mine["median_ms"], rates))
    if lines:
        lines.insert(0, f"\n{'target, float32':<52}{'':<34}{'asked':>11}{'found':>10}")
    return lines
