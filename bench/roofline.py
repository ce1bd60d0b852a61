"""The picture of ``python bench/memory_ops.py --plot``: every row's time over its least work, with measured limits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bench.cases import Case, Work, all_cases, work
from bench.report import Record

COLOURS = {
    "cpu": "tab:blue",
    "triton": "tab:orange",
    "cuda": "tab:green",
    "reference": "tab:purple",
    "compiled": "tab:brown",
    "released": "tab:red",
}
MARKERS = {"masked_average_pool": "o", "memory_read": "s", "memory_pass": "D", "upsample_cross_entropy": "^"}


def draw(
    path: str,
    records: list[Record],
    bandwidth: float,
    exponentials: float | None,
    title: str,
    notes: dict[str, str] | None = None,
) -> None:
    """Two panels, time over bytes and time over exponentials; what lies on a line cannot be faster.

    The second only where its line is known.

    Args:
        path: of the PNG.
        records: rows of memory_ops.
        bandwidth, exponentials: ceilings, a second; None where it was not measured.
        title: above both.
        notes: kept in the file.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = {(case.op, case.size, case.dtype): case for case in all_cases()}
    shown = [
        (cases[record["op"], record["size"], record["dtype"]], record)
        for record in records
        if record["backend"] in COLOURS and record["pass"] != "fwd+bwd"
    ]
    count = 2 if exponentials else 1
    figure, panels = pyplot.subplots(1, count, figsize=(2 + 5.5 * count, 6), squeeze=False, layout="constrained")
    panels = panels[0]
    _panel(panels[0], shown, lambda least: least.moved / 1e6, bandwidth / 1e6, "least bytes moved, MB")
    panels[0].set_title(f"copy bandwidth {bandwidth / 1e9:.4g} GB/s")
    if exponentials:
        label = "least exponentials and logarithms, millions"
        _panel(panels[1], shown, lambda least: least.exponentials / 1e6, exponentials / 1e6, label)
        panels[1].set_title(f"{exponentials / 1e9:.3g} G exponentials a second")
    _legend(figure, [record for _, record in shown], 3 * count)
    figure.suptitle(title)
    figure.savefig(path, dpi=130, metadata=notes)
    pyplot.close(figure)


def _panel(
    axes: Any, shown: list[tuple[Case, Record]], amount: Callable[[Work], float], rate: float, label: str
) -> None:
    """One panel: points where there is an amount, the line of ``rate`` (amount a second) under them."""
    points = [
        (amount(work(case, record["pass"])), record["median_ms"], record)
        for case, record in shown
        if amount(work(case, record["pass"])) > 0
    ]
    for x, y, record in points:
        colour, marker = COLOURS[record["backend"]], MARKERS[record["op"]]
        hollow = record["dtype"] != "float32"
        axes.plot(x, y, marker, color=colour, markerfacecolor="none" if hollow else colour, markersize=6, alpha=0.75)
    axes.set(xscale="log", yscale="log", xlabel=label, ylabel="median, ms")
    axes.grid(True, which="major", alpha=0.3)
    if points:
        ends = [min(x for x, _, _ in points) / 1.5, max(x for x, _, _ in points) * 1.5]
        axes.plot(ends, [x / rate * 1e3 for x in ends], color="black", linewidth=1)


def _legend(figure: Any, records: list[Record], columns: int) -> None:
    """Colours are implementations, shapes are operators."""
    from matplotlib.lines import Line2D

    backends, ops = ({record[key] for record in records} for key in ("backend", "op"))
    entries = [
        Line2D([], [], marker="o", linestyle="", color=colour, label=name)
        for name, colour in COLOURS.items()
        if name in backends
    ]
    entries += [
        Line2D([], [], marker=marker, linestyle="", color="grey", label=name)
        for name, marker in MARKERS.items()
        if name in ops
    ]
    if any(record["dtype"] != "float32" for record in records):
        entries.append(Line2D([], [], marker="o", linestyle="", color="grey", markerfacecolor="none", label="bf16"))
    entries.append(Line2D([], [], color="black", linewidth=1, label="measured ceiling"))
    figure.legend(handles=entries, loc="outside lower center", ncols=columns, frameon=False)
