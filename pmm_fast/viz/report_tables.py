"""The tables of a report: scores, classes, training, configuration; from plain values to ``report.Table``."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from pmm_fast.viz.curves import Line
from pmm_fast.viz.report import Cell, Table
from pmm_fast.viz.results import RunScores

NOTHING = "-"

Value = Callable[[str], float]
"""Of a run by its name."""


@dataclass(frozen=True)
class _Column:
    title: str
    value: Value
    hint: Callable[[str], str] = lambda run: ""
    small_is_best: bool = False

    def cells(self, runs: Collection[str]) -> list[Cell]:
        values = {run: self.value(run) for run in runs}
        best = best_of(list(values.values()), self.small_is_best)
        return [Cell(percent(value), percent(value) == best, hint=self.hint(run)) for run, value in values.items()]


def percent(share: float) -> str:
    """A share in percent with one decimal; a dash where there is none."""
    return NOTHING if math.isnan(share) else f"{100 * share:.1f}"


def best_of(values: Sequence[float], small: bool = False) -> str:
    """The largest (or smallest) of some shares as ``percent`` writes it; empty where none is better than another."""
    numbers = [value for value in values if not math.isnan(value)]
    if len({percent(value) for value in numbers}) < 2:
        return ""
    return percent(min(numbers) if small else max(numbers))


def score_table(runs: Mapping[str, RunScores], sources: Mapping[str, Collection[str]]) -> Table:
    """mIoU of every run on every domain, with the means over those it was trained on and those it never saw.

    Args:
        runs: name of each run to what it scored; at least one.
        sources: the domains that each was trained on.
    """
    domains = list(dict.fromkeys(domain for run in runs.values() for domain in run.domains))

    def score(run: str, domain: str) -> float:
        return runs[run].domains[domain].miou if domain in runs[run].domains else math.nan

    def mean(run: str, seen: bool) -> float:
        # a mean over fewer domains than the others' would not compare: NaN if one is missing
        values = [score(run, domain) for domain in domains if (domain in sources[run]) == seen]
        return sum(values) / len(values) if values else math.nan

    def column(domain: str) -> _Column:
        return _Column(domain, lambda run: score(run, domain))

    drop = _Column("drop", lambda run: mean(run, True) - mean(run, False), small_is_best=True)
    about = "mIoU in percent; drop: mean over the domains trained on less mean over the unseen ones, in points"
    about += "; the best of each column in bold." if len(runs) > 1 else "."
    trained = [domain for domain in domains if any(domain in names for names in sources.values())]
    if all(domain in names for domain in trained for names in sources.values()):
        seen = [column(domain) for domain in trained]
        unseen = [column(domain) for domain in domains if domain not in trained]
        if len(seen) > 1:
            seen.append(_Column("mean", lambda run: mean(run, True)))
        if len(unseen) > 1:
            unseen.append(_Column("mean", lambda run: mean(run, False)))
        parts = [("trained on", seen), ("unseen", unseen), ("", [drop] if seen and unseen else [])]
        groups = [("", 1), *((title, len(columns)) for title, columns in parts if columns)]
        return _table(about, [each for _, columns in parts for each in columns], runs, groups)
    # one run's source is another's unseen domain: told cell by cell

    def told(domain: str) -> _Column:
        return replace(column(domain), hint=lambda run: "seen" if domain in sources[run] else "unseen")

    columns = [told(domain) for domain in domains]
    means = [_Column(f"mean {'seen' if each else 'unseen'}", partial(mean, seen=each)) for each in (True, False)]
    return _table(f"{about} Seen: trained on by that run.", [*columns, *means, drop], runs, [])


def _table(caption: str, columns: Sequence[_Column], runs: Collection[str], groups: Sequence[tuple[str, int]]) -> Table:
    cells = [column.cells(runs) for column in columns]
    rows = [(run, [column[position] for column in cells]) for position, run in enumerate(runs)]
    return Table(caption, ["", *(column.title for column in columns)], rows, groups)


def class_table(runs: Mapping[str, RunScores], classes: Sequence[str]) -> Table:
    """IoU of every class, a column a run and domain, tinted by its value.

    Args:
        runs: name of each run to what it scored; at least one.
        classes: names of the classes.
    """
    domains = list(dict.fromkeys(domain for run in runs.values() for domain in run.domains))
    columns = [(domain, run) for domain in domains for run in runs if domain in runs[run].domains]
    rows = []
    for position, name in enumerate(classes):
        values = [runs[run].domains[domain].iou[position] for domain, run in columns]
        cells = []
        for (domain, _), value in zip(columns, values, strict=True):
            best = best_of([v for (other, _), v in zip(columns, values, strict=True) if other == domain])
            cells.append(Cell(percent(value), percent(value) == best, None if math.isnan(value) else value))
        rows.append((name, cells))
    header = ["class", *(run if len(runs) > 1 else domain for domain, run in columns)]
    spans = [(domain, sum(other == domain for other, _ in columns)) for domain in domains]
    about = "IoU of every class in percent, tinted by its value; a dash: neither in the truth nor predicted."
    if len(runs) > 1:
        about += " The best run of each domain in bold."
    return Table(about, header, rows, [("", 1), *spans] if len(runs) > 1 else [])


def training_table(logs: Mapping[str, Sequence[Line]]) -> Table:
    """What the logs of training say in numbers: how long, how fast, and where the losses ended.

    Args:
        logs: name of each run to the lines of its log, by iteration; none of them empty.
    """
    entries: dict[str, dict[str, str]] = {"iterations": {}, "seconds an iteration": {}, "waiting for data": {}}
    for run, lines in logs.items():
        entries["iterations"][run] = f"{lines[-1]['iteration']:,}"
        seconds = [line["seconds"] for line in lines if line.get("seconds") is not None]
        waits = [line["data_wait"] for line in lines if line.get("data_wait") is not None]
        if seconds:
            entries["seconds an iteration"][run] = f"{np.median(seconds):.3g}"
        if waits:
            entries["waiting for data"][run] = f"{100 * np.mean(waits):.1f} %"
    ends = {run: lines[-max(1, len(lines) // 10) :] for run, lines in logs.items()}
    # in the order of the run with the most losses
    losses = sorted((list(lines[-1].get("losses", {})) for lines in logs.values()), key=len, reverse=True)
    for name in dict.fromkeys(name for names in losses for name in names):
        title = "mean top weight of the read" if name == "train/top_weight" else f"loss {name}"
        values = {run: [line.get("losses", {}).get(name) for line in lines] for run, lines in ends.items()}
        found = {run: [value for value in each if value is not None] for run, each in values.items()}
        entries[title] = {run: f"{np.mean(each):.3f}" for run, each in found.items() if each}
    rows = [(title, [Cell(cells.get(run, NOTHING)) for run in logs]) for title, cells in entries.items() if cells]
    return Table(
        "Length of training; median time of a logged iteration, and the share of it spent waiting for data; means of "
        "the losses (train: meta-train, test: meta-test) over the last tenth of the log.",
        ["", *logs],
        rows,
    )


def difference_table(configs: Mapping[str, Mapping[str, Any]]) -> Table | None:
    """The options in which runs differ.

    Args:
        configs: name of each run (or of the defaults) to its configuration as nested mappings.

    Returns:
        A row an option; None where there is no difference.
    """
    flat = {run: _flatten(config) for run, config in configs.items()}
    keys = dict.fromkeys(key for options in flat.values() for key in options)
    # where a run was written is no difference between methods
    rows = [
        (key, [Cell(_show(options.get(key))) for options in flat.values()])
        for key in keys
        if key not in ("out", "resume") and len({_show(options.get(key)) for options in flat.values()}) > 1
    ]
    about = f"Options that differ between {' and '.join(configs)}, but for the folder; all others are the same."
    return Table(about, ["option", *configs], rows, words=True) if rows else None


def _flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}.{name}": inner for name, inner in _flatten(value).items()}
        else:
            flat[key] = value
    return flat


def _show(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value) if value not in ("", None) else NOTHING
