"""The picture of ``python bench/memory_ops.py --plot``: every row's time over its least work, with measured limits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bench.cases import Case, Work, all_cases, work
from bench.harness import Rates
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


def draw(path: str, records: list[Record], rates: Rates, title: str) -> None:
    """Two panels, time over bytes and time over exponentials; what lies on a line cannot be faster."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = {(case.op, case.size, case.dtype): case for case in all_cases()}
    shown = [
        (cases[record["op"], record["size"], record["dtype"]], record)
        for record in records
        if record["backend"] in COLOURS and record["pass"] != "fwd+bwd"
    ]
    figure, panels = pyplot.subplots(1, 2, figsize=(13, 6), layout="constrained")
    _panel(panels[0], shown, lambda least: least.moved / 1e6, rates.bandwidth / 1e6, "least bytes moved, MB")
    label = "least exponentials and logarithms, millions"
    _panel(panels[1], shown, lambda least: least.exponentials / 1e6, rates.exponentials / 1e6, label)
    panels[0].set_title(f"copy bandwidth {rates.bandwidth / 1e9:.1f} GB/s")
    panels[1].set_title(f"{rates.exponentials / 1e9:.2f} G exponentials a second (torch.exp)")
    _legend(figure, [record for _, record in shown])
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
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


def _legend(figure: Any, records: list[Record]) -> None:
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
    entries.append(Line2D([], [], color="black", linewidth=1, label="what PyTorch reaches"))
    figure.legend(handles=entries, loc="outside lower center", ncols=6, frameon=False)
