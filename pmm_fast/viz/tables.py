"""Tables of scores as aligned text or Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

NOTHING = "-"


def results_table(
    runs: Mapping[str, Mapping[str, float]],
    sources: Sequence[str],
    unseen: Sequence[str],
    markdown: bool = False,
    score: str = "mIoU %",
) -> str:
    """One row a run, one column a domain, with the means over source and unseen domains.

    The column ``drop`` is the mean over sources less the mean over unseen domains, in points: what a network loses
    where it was never trained.

    Args:
        runs: name of each run to the score (0..1) of each domain; a domain may be missing, a score NaN.
        sources: domains trained on, in order; repeated names count once.
        unseen: domains never trained on.
        markdown: a Markdown table instead of plain text.
        score: what the numbers are, for the corner of the table.

    Returns:
        The table, in percent with one decimal, without a final newline.
    """
    sources, unseen = list(dict.fromkeys(sources)), list(dict.fromkeys(unseen))
    header = [score, *sources]
    if len(sources) > 1:
        header.append("mean source")
    header += unseen
    if len(unseen) > 1:
        header.append("mean unseen")
    if sources and unseen:
        header.append("drop")
    rows = [[name, *_cells(scores, sources, unseen)] for name, scores in runs.items()]
    return _markdown(header, rows) if markdown else _plain(header, rows)


def _cells(scores: Mapping[str, float], sources: Sequence[str], unseen: Sequence[str]) -> list[str]:
    cells, means = [], []
    for names in (sources, unseen):
        values = [scores.get(name, math.nan) for name in names]
        # a mean over fewer domains than the column says would not compare
        means.append(sum(values) / len(values) if values else math.nan)
        cells += [_percent(value) for value in values]
        if len(names) > 1:
            cells.append(_percent(means[-1]))
    if sources and unseen:
        cells.append(_percent(means[0] - means[1]))
    return cells


def _percent(share: float) -> str:
    return NOTHING if math.isnan(share) else f"{100 * share:.1f}"


def class_table(
    runs: Mapping[str, Sequence[float]], classes: Sequence[str], markdown: bool = False, score: str = "IoU %"
) -> str:
    """One row a class, one column a run.

    Args:
        runs: name of each run to its score (0..1, NaN for none) of every class.
        classes: class names.
        markdown: a Markdown table instead of plain text.
        score: what the numbers are.

    Returns:
        The table, in percent with one decimal, without a final newline.

    Raises:
        ValueError: a run does not have one score a class.
    """
    for name, scores in runs.items():
        if len(scores) != len(classes):
            raise ValueError(f"class_table: run {name!r} has {len(scores)} scores, expected {len(classes)}")
    rows = [
        [label, *(_percent(scores[position]) for scores in runs.values())] for position, label in enumerate(classes)
    ]
    header = [score, *runs]
    return _markdown(header, rows) if markdown else _plain(header, rows)


def _plain(header: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = []
    for row in [header, ["-" * width for width in widths], *rows]:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    rule = [":---", *["---:"] * (len(header) - 1)]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in [header, rule, *rows]
    )
