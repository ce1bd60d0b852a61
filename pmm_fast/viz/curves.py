"""Training curves from the logs of runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito's palette, told apart by colour-blind readers too."""

Line = dict[str, Any]
Style = Literal["-", "--"]


@dataclass(frozen=True)
class Series:
    """One line of a panel: how it is read from a log line, and how it is drawn."""

    read: Callable[[Line], float | None]
    style: Style
    name: str
    smooth: bool = True


def _loss(key: str) -> Callable[[Line], float | None]:
    return lambda line: line.get("losses", {}).get(key)


def _value(key: str) -> Callable[[Line], float | None]:
    return lambda line: line.get(key)


PANELS: tuple[tuple[str, tuple[Series, ...]], ...] = (
    ("total loss", (Series(_loss("total"), "-", ""),)),
    (
        "segmentation loss",
        (
            Series(_loss("train/seg"), "-", "meta-train"),
            Series(_loss("test/seg"), "--", "meta-test"),
            Series(_loss("seg"), "-", ""),
        ),
    ),
    (
        "learning rate",
        (Series(_value("lr"), "-", "outer", smooth=False), Series(_value("inner_lr"), "--", "inner", smooth=False)),
    ),
    ("mean top weight of the read", (Series(_loss("train/top_weight"), "-", ""),)),
)
"""Title and lines of every panel; those without data are left out."""


def read_metrics(path: str | Path) -> list[Line]:
    """The lines of a ``metrics.jsonl``, by iteration.

    A last line that was cut off by an interruption is left out; of an iteration logged twice (a resumed run) the later
    line counts.

    Raises:
        ValueError: a line is no JSON object with an ``iteration``; names file and line.
        OSError: the file cannot be read.
    """
    texts = Path(path).read_text(encoding="utf-8").splitlines()
    lines: dict[int, Line] = {}
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
            lines[int(line["iteration"])] = line
        except (ValueError, KeyError, TypeError) as error:
            if number == len(texts):
                break
            raise ValueError(
                f"{path}, line {number}: expected a JSON object with an iteration, got {text!r}"
            ) from error
    return [lines[iteration] for iteration in sorted(lines)]


def smoothed(values: np.ndarray, span: int) -> np.ndarray:
    """Exponential moving average over about ``span`` values, without the usual lag of the start at the first value.

    Args:
        values: ``[N]``.
        span: about how many values count; 1 leaves them as they are.

    Returns:
        float64 ``[N]``.
    """
    keep = 1 - 2 / (max(span, 1) + 1)
    result, total, weight = np.empty(len(values), np.float64), 0.0, 0.0
    for position, value in enumerate(values):
        total, weight = keep * total + value, keep * weight + 1
        result[position] = total / weight
    return result


def plot_curves(runs: Mapping[str, str | Path], out_png: str | Path, span: int = 0) -> Path:
    """Draw the curves of one or more runs, a colour each, one panel a quantity.

    Args:
        runs: name of each run to its ``metrics.jsonl``.
        out_png: file to write.
        span: log lines over which losses are smoothed (the raw ones stay as a faint line); 0: a twentieth of the run.

    Returns:
        ``out_png``.

    Raises:
        ImportError: matplotlib is missing; names the extra.
        ValueError: no runs, a broken log, or nothing in them to draw.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("training curves need matplotlib: pip install 'pmm_fast[viz]'") from error
    logs = {name: read_metrics(path) for name, path in runs.items()}
    panels = [
        (title, drawn)
        for title, series in PANELS
        if (drawn := [s for s in series if any(s.read(line) is not None for log in logs.values() for line in log)])
    ]
    if not panels:
        raise ValueError(f"nothing to draw in {', '.join(map(str, runs.values())) or 'no runs'}")
    # no pyplot: it would keep the figure, and choose a backend for the whole process
    columns = len(panels) if len(panels) <= 3 else 2
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.8 * columns, 3.0 * rows + 0.4), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    for position, (title, series) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, position + 1)
        _draw_panel(axes, logs, series, span)
        axes.set_title(title, fontsize=11)
        if position + columns >= len(panels):
            axes.set_xlabel("iteration")
        axes.grid(alpha=0.25)
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
    if len(logs) > 1:
        handles = [_line(COLOURS[i % len(COLOURS)], "-", name) for i, name in enumerate(logs)]
        figure.legend(handles=handles, loc="outside upper center", ncols=min(len(logs), 6), frameon=False)
    Path(out_png).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out_png)
    return Path(out_png)


def _draw_panel(axes: Any, logs: Mapping[str, list[Line]], series: list[Series], span: int) -> None:
    for position, log in enumerate(logs.values()):
        colour = COLOURS[position % len(COLOURS)]
        for line in series:
            points = [(entry["iteration"], value) for entry in log if (value := line.read(entry)) is not None]
            if not points:
                continue
            x, y = (np.array(axis, np.float64) for axis in zip(*points, strict=True))
            if not line.smooth:
                axes.plot(x, y, line.style, color=colour, linewidth=1.6)
                continue
            if line.style == "-":
                # two faint lines over each other hide the smooth ones
                axes.plot(x, y, line.style, color=colour, linewidth=0.8, alpha=0.3)
            axes.plot(x, smoothed(y, span or len(y) // 20), line.style, color=colour, linewidth=1.6)
    named = [line for line in series if line.name]
    if len(named) > 1:
        axes.legend(handles=[_line("#555555", line.style, line.name) for line in named], frameon=False, fontsize=9)


def _line(colour: str, style: Style, name: str) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=colour, linestyle=style, label=name)
