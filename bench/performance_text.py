"""Tables of ``bench/performance.py``: rows of a record as lines of Markdown, for the page and for the README."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from bench.cases import Case, all_cases, work
from bench.harness import Rates
from bench.records import RATES, Machine, Part, Row
from bench.report import floor_seconds

ARCHITECTURES = {
    "deeplabv3plus_resnet50": "DeepLabV3+ ResNet-50",
    "deeplabv3plus_mobilenet_v2": "DeepLabV3+ MobileNetV2",
}
FILES = {
    "gtav": "like GTA V: PNG 1914 x 1052, palette labels",
    "synthia": "like SYNTHIA: PNG 1280 x 760, 16-bit labels",
    "jpeg": "JPEG 2048 x 1024, 8-bit labels",
}
PIPELINES = ("released", "torch_pillow", "torch", "dali")
NOTHING = "-"
PASSES = ("fwd", "bwd", "bwd2")


# --- figures and tables -------------------------------------------------------------------------------------------


def number(value: float | None, digits: int = 3) -> str:
    """A figure with so many significant digits, but never a digit before the point less."""
    if value is None:
        return NOTHING
    # rounded first, so that 99.97 counts as three digits before the point
    rounded = float(f"{value:.{digits}g}")
    if abs(rounded) >= 10 ** (digits - 1):
        return f"{value:.0f}"
    return f"{value:#.{digits}g}".removesuffix(".")


def ratio(value: float | None) -> str:
    """How many times, to hundredths where it is below ten."""
    if value is None:
        return NOTHING
    return number(value, 2) if value < 0.1 else f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}"


def several(values: Iterable[float | None], digits: int = 3) -> str:
    """Figures of one kind in one cell."""
    return " / ".join(number(value, digits) for value in values)


def durations(milliseconds: Sequence[float | None], digits: int = 3) -> str:
    """Durations in one cell, in the unit that suits the shortest."""
    known = [value for value in milliseconds if value is not None]
    if not known:
        return NOTHING
    unit, factor = ("µs", 1e3) if min(known) < 0.1 else ("ms", 1)
    return f"{several([None if value is None else value * factor for value in milliseconds], digits)} {unit}"


def size_of(count: float) -> str:
    """Bytes in MB, or GB where those would be many."""
    return f"{count / 1e9:.1f} GB" if count >= 1e10 else f"{number(count / 1e6)} MB"


def rate_of(count: float) -> str:
    """How many a second, with a prefix."""
    power, prefix = next((power, prefix) for power, prefix in ((12, "T"), (9, "G"), (6, "M")) if count >= 10**power)
    return f"{number(count / 10**power)} {prefix}"


def percent(share: float | None) -> str:
    """A share in per cent."""
    return NOTHING if share is None else f"{number(100 * share, 2)} %"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table as lines, an empty one after it."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, *rows)]
    lines.insert(1, "|" + "---|" * len(header))
    return [line.replace("|  |", "| |") for line in lines] + [""]


def link(part: Part, document: Path) -> str:
    """A link to a record, as a document names it."""
    return f"[record]({Path(os.path.relpath(part.source, document.parent)).as_posix()})"


def made_by(machine: Machine, part: Part) -> str:
    """Where a part was measured, for a sentence."""
    return f"{machine.title}, PyTorch {str(part.facts['torch']).split('+')[0]}"


# --- operators ----------------------------------------------------------------------------------------------------


def case_of(row: Row) -> Case:
    """The case that a row measured.

    Raises:
        ValueError: there is none of that name.
    """
    for case in all_cases():
        if (case.op, case.size, case.dtype) == (row["op"], row["size"], row["dtype"]):
            return case
    raise ValueError(f"bench/cases.py knows no {row['op']} {row['size']} {row['dtype']}")


def operator_name(case: Case) -> str:
    """An operator, and which of its cases of a size."""
    if case.op == "memory_pass":
        return f"`{case.op}`, {'one tensor' if case.one_tensor else 'two tensors'}"
    if case.op == "upsample_cross_entropy":
        return f"`{case.op}`, {case.side} to {case.label_side}"
    return f"`{case.op}`"


class Operators:
    """The rows of memory_ops by what they measured."""

    def __init__(self, machine: Machine) -> None:
        rows = machine.rows("memory_ops")
        self.kernels = machine.kernels()
        self.records = {tuple(row[key] for key in ("op", "size", "dtype", "backend", "pass")): row for row in rows}
        rates = [machine.rates().get(name) for name in RATES]
        self.rates = Rates(*rates) if all(rates) else None
        order = all_cases()
        self.cases = sorted({case_of(row) for row in rows}, key=order.index)

    def find(self, case: Case, backend: str | None, which: str, key: str = "median_ms") -> float | None:
        """A figure, or None where it was not measured."""
        row = self.records.get((case.op, case.size, case.dtype, backend or "", which))
        return None if row is None else row[key]

    def passes(self, case: Case, backend: str | None, key: str = "median_ms") -> list[float | None]:
        """Forward, backward and double backward."""
        return [self.find(case, backend, which, key) for which in PASSES]

    def taken(self, case: Case) -> str | None:
        """The backend that the dispatch takes of those that were measured."""
        return next((name for name in self.kernels if self.find(case, name, "fwd") is not None), None)

    def total(self, case: Case, backend: str | None, key: str = "median_ms") -> float | None:
        """A figure summed over the three passes, or None where one was not measured."""
        values = self.passes(case, backend, key)
        return None if None in values else sum(value for value in values if value is not None)

    def shares_of_floor(self, case: Case) -> list[float | None]:
        """The least time of each pass at the measured rates, over what it took."""
        if self.rates is None:
            return []
        took = zip(PASSES, self.passes(case, self.taken(case)), strict=True)
        return [1e3 * floor_seconds(work(case, which), self.rates) / ms if ms else None for which, ms in took]

    def ratio(self, case: Case, other: str, which: str, key: str = "median_ms") -> float | None:
        """Another implementation's figure over ours."""
        mine, its = self.find(case, self.taken(case), which, key), self.find(case, other, which, key)
        return None if not mine or its is None else its / mine


def operator_table(operators: Operators) -> list[str]:
    """Everything that was measured, a line a case."""
    header = ["operator", "size", "ours", "forward / backward / double backward", "of the copy bandwidth"]
    header += ["of the floor"] if operators.rates else []
    header += ["released", "plain PyTorch", "torch.compile", "times faster than these, with backward"]
    header += ["peak memory: ours, released"]
    rows = []
    for case in operators.cases:
        ours = operators.taken(case)
        size = case.size.split("/")[0] + ("" if case.dtype == "float32" else f", {case.dtype}")
        cells = [operator_name(case), size, ours or NOTHING, durations(operators.passes(case, ours))]
        cells.append(" / ".join(percent(share) for share in operators.passes(case, ours, "bandwidth_share")))
        cells += [" / ".join(map(percent, operators.shares_of_floor(case)))] if operators.rates else []
        others = ("released", "reference", "compiled")
        cells += [durations(_trimmed(operators.passes(case, other))) for other in others]
        cells.append(" / ".join(ratio(operators.ratio(case, other, "fwd+bwd")) for other in others))
        peaks = [operators.find(case, name, "fwd+bwd", "extra_peak_bytes") for name in (ours, "released")]
        rows.append([*cells, ", ".join(NOTHING if peak is None else size_of(peak) for peak in peaks)])
    return table(header, rows)


def _trimmed(values: list[float | None]) -> list[float | None]:
    """Without what was not measured at the end."""
    while values and values[-1] is None:
        values = values[:-1]
    return values


def command(machine: Machine, bench: str) -> str:
    """What makes a record again: that of a GPU has other sizes than the bench by itself."""
    return "`make gpu-check`" if machine.gpu else f"`python bench/{bench}.py`"


def operators_in_short(machine: Machine, document: Path) -> list[str]:
    """The README's table: the paper's size in float32 beside the released chain."""
    part, operators = machine.parts["memory_ops"], Operators(machine)
    what = "kernels" if machine.gpu else "C++ kernels"
    text = [
        "The operators at the paper's size (8 images of 768 x 768, 256 channels of 48 x 48, 19 classes, float32), "
        f"{what} on {made_by(machine, part)}, against the released code's chain of operations, medians of one run "
        f"({link(part, document)}, {command(machine, 'memory_ops')}):",
        "",
    ]
    rows = []
    for case in operators.cases:
        if case.size.split("/")[0] != "paper" or case.dtype != "float32" or case.size.endswith("/two"):
            continue
        ours, both = operators.taken(case), ("fwd", "fwd+bwd")
        share = operators.ratio(case, "released", "fwd+bwd", "extra_peak_bytes")
        rows.append(
            [
                operator_name(case),
                durations([operators.find(case, ours, which) for which in (*both, "bwd2")], 2),
                durations([operators.find(case, "released", which) for which in both], 2),
                several([operators.ratio(case, "released", which) for which in both], 2),
                percent(1 / share if share else None),
            ]
        )
    header = ["", "ours, forward / with backward / second backward", "released, forward / with backward"]
    return text + table([*header, "times faster", "peak memory of released"], rows)


# --- the step -----------------------------------------------------------------------------------------------------


def variant_name(name: str) -> str:
    """A variant in words."""
    words = {"released": "released (first order, anomaly mode on)", "released_no_anomaly": "released, no anomaly mode"}
    words |= {"plain": "plain forward and backward", "plain_bf16": "plain forward and backward, bf16"}
    if name in words:
        return words[name]
    return ", ".join(name.replace("order", "order ").split("_"))


def step_size(part: Part) -> str:
    """Network and images of the iterations of a record."""
    row, (height, width) = part.rows[0], part.rows[0]["crop"]
    network = ARCHITECTURES.get(row["architecture"], row["architecture"])
    return f"{network}, two domains of {row['images_a_domain']} images of {height} x {width}"


def step_setup(machine: Machine, part: Part, document: Path) -> str:
    """What the iterations of a record have in common."""
    row, text = part.rows[0], f"{step_size(part)}, {made_by(machine, part)}"
    text += ", TF32 allowed" if row.get("tf32") else ""
    text += ", compiled: captured as a CUDA graph" if row.get("engine") == "cuda-graph" else ""
    return f"{text}, medians of one run ({link(part, document)}, {command(machine, 'meta_step')})"


def step_table(part: Part) -> list[str]:
    """Everything that was measured, a line a variant."""
    header = ["iteration", "seconds, median (20 to 80 %)", "images/s", "times released", "without anomaly mode"]
    header += ["peak memory", "kept between", "multiply-adds of convolutions", "of these a second", "compiling"]
    rows = []
    for row in part.rows:
        products, compiling = row["multiply_adds_millions"], row.get("compile_seconds")
        rows.append(
            [
                variant_name(row["variant"]),
                f"{number(row['seconds_per_step'])} ({number(row['p20_s'])} to {number(row['p80_s'])})",
                number(row["images_per_s"]),
                *(ratio(row[key]) for key in ("ratio_released", "ratio_released_no_anomaly")),
                *(size_of(row[key]) for key in ("peak_bytes", "kept_bytes")),
                NOTHING if products is None else rate_of(products * 1e6),
                NOTHING if products is None else rate_of(products * 1e6 / row["seconds_per_step"]),
                "" if compiling is None else f"{number(compiling, 2)} s",
            ]
        )
    return table(header, rows)


def step_in_short(machine: Machine, document: Path) -> list[str]:
    """The README's table: the released iteration and ours, and what order 2 costs."""
    part = machine.parts["meta_step"]
    text = "One training iteration beside the released one, same images and weights, behind a check that both compute "
    text += f"the same: {step_setup(machine, part, document)}:"
    shown = [row for row in part.rows if row["variant"] == "released" or row["variant"].startswith("order")]
    shown.sort(key=lambda row: row["order"])
    best = {row["order"]: row["images_per_s"] for row in sorted(shown, key=lambda row: row["images_per_s"])}
    rows = []
    for row in shown:
        name = variant_name(row["variant"])
        name = name.replace("order 2", "order 2, the exact gradient") if name == "order 2" else name
        times = ratio(row["ratio_released"])
        rows.append(
            [
                name,
                *(number(row[key]) for key in ("seconds_per_step", "images_per_s")),
                f"**{times}**" if row["images_per_s"] == best[row["order"]] else times,
                ratio(row["ratio_released_no_anomaly"]),
                size_of(row["peak_bytes"]),
            ]
        )
    header = ["", "seconds", "images/s", "times the released speed", "without its anomaly mode", "peak memory"]
    return [text, "", *table(header, rows), *order_two(part)]


def order_two(part: Part) -> list[str]:
    """What the exact gradient costs, in multiply-adds and in time, for each pair of variants that was measured."""
    rows = {row["variant"]: row for row in part.rows}
    pairs = [
        (rows[other], row)
        for name, row in rows.items()
        if "order2" in name and (other := name.replace("order2", "order1")) in rows
    ]
    if not pairs:
        return []
    counts = [row["multiply_adds_millions"] for row in pairs[0]]
    work = f"{ratio(counts[1] / counts[0])} times the multiply-adds of order 1, and " if all(counts) else ""
    ratios = [two["seconds_per_step"] / one["seconds_per_step"] for one, two in pairs]
    kinds = [", ".join(one["variant"].split("_")[1:]) or "float32, eager" for one, _ in pairs]
    times = ", ".join(f"{ratio(value)} ({kind})" for value, kind in zip(ratios, kinds, strict=True))
    text = "The exact gradient takes six more products of each convolution of the inner pass: "
    return [f"{text}{work}{times} times its time.", ""]


# --- loading, evaluation, photometric -----------------------------------------------------------------------------


def loading_table(part: Part) -> tuple[int, list[str]]:
    """How many workers, and images a second of every pipeline with so many."""
    workers = max(row["workers"] for row in part.rows)
    rates: dict[str, dict[str, float]] = {}
    for row in part.rows:
        if row["workers"] == workers:
            rates.setdefault(row["files"], {})[row["pipeline"]] = row["images_per_s"]
    rows = []
    for kind, found in rates.items():
        fastest = max(found, key=found.__getitem__)
        cells = [number(found.get(name)) for name in PIPELINES]
        cells = [f"**{cell}**" if name == fastest else cell for name, cell in zip(PIPELINES, cells, strict=True)]
        times = found[fastest] / found["released"] if "released" in found else None
        rows.append([FILES.get(kind, kind), *cells, ratio(times)])
    header = ["files", "released", "Pillow and NumPy in torch workers", "`--loader torch`", "`--loader dali`"]
    return workers, table([*header, "times released"], rows)


def loading_in_short(machine: Machine, document: Path) -> list[str]:
    """The README's table."""
    part = machine.parts["data_loading"]
    (height, width), (workers, lines) = part.rows[0]["crop"], loading_table(part)
    text = f"Loading training crops of {height} x {width}, images a second with {workers} workers, "
    text += f"{made_by(machine, part)}, files of the true sizes and encodings, one run ({link(part, document)}, "
    text += "`python bench/data_loading.py`)."
    return [f"{text} All rows draw the same crops; behind a check that they are the same:", "", *lines]


def evaluation_table(part: Part) -> list[str]:
    """Every protocol and way."""
    header = ["protocol", "way", "seconds an image", "network", "all else", "peak memory", "times released"]
    header += ["all but the network, times released"]
    rows = []
    for row in part.rows:
        seconds = [number(row[key]) for key in ("seconds", "network_seconds", "rest_seconds")]
        ratios = [ratio(row[key]) for key in ("times_released", "rest_times_released")]
        rows.append([f"`{row['protocol']}`", row["way"], *seconds, size_of(row["peak_bytes"]), *ratios])
    return table(header, rows)


def evaluation_in_short(machine: Machine, document: Path) -> list[str]:
    """The README's sentence: the released protocol by tiles."""
    part = machine.parts["evaluation"]
    rows = {row["way"]: row for row in part.rows if row["protocol"] == "released-sliding"}
    if not {"released", "ours"} <= rows.keys():
        return [f"Testing by tiles was not measured on {machine.title}.", ""]
    ours, theirs = rows["ours"], rows["released"]
    network = ARCHITECTURES.get(ours["architecture"], ours["architecture"])
    return [
        "Testing by tiles and mirrored, as the released evaluation does, takes "
        f"{number(ours['seconds'])} s for an image of {ours['height']} x {ours['width']} where the released way takes "
        f"{number(theirs['seconds'])}: {ratio(ours['times_released'])} times the speed, all but the network "
        f"{number(ours['rest_times_released'], 2)} times, in {size_of(ours['peak_bytes'])} where that takes "
        f"{size_of(theirs['peak_bytes'])} ({network}, "
        f"{made_by(machine, part)}, {link(part, document)}, {command(machine, 'evaluation')}).",
        "",
    ]


def photometric_table(part: Part) -> list[str]:
    """Milliseconds an image by backend and look."""
    looks = list(dict.fromkeys(row["look"] for row in part.rows))
    rows: dict[str, dict[str, float]] = {}
    for row in part.rows:
        rows.setdefault(row["backend"], {})[row["look"]] = row["ms_per_image"]
    lines = [[name, *(durations([found.get(look)]) for look in looks)] for name, found in rows.items()]
    return table(["`photometric`, an image", *looks], lines)
