"""Regions of docs/performance.md that ``bench/performance.py`` writes: machines, results, targets, a GPU, backends."""

from __future__ import annotations

from pathlib import Path

from bench import loading_report, report, step_report
from bench.cases import Case, all_cases, work
from bench.harness import Rates
from bench.performance_text import (
    NOTHING,
    PASSES,
    Operators,
    durations,
    evaluation_table,
    link,
    loading_table,
    number,
    operator_name,
    operator_table,
    percent,
    photometric_table,
    rate_of,
    ratio,
    several,
    step_setup,
    step_table,
    table,
)
from bench.records import Machine, Part
from pmm_fast.ops.backends import BACKENDS

# an H100 SXM by its data sheet: bytes, and float32 multiply-adds outside the tensor cores, a second; and 16 special
# functions a clock on each of 132 multiprocessors (CUDA programming guide), at the clock that gives those multiply-adds
DATASHEET = Rates(bandwidth=3.35e12, exponentials=132 * 16 * 1.98e9, products=67e12 / 2)
# nine tenths of that, which a copy may be expected to reach
EXPECTED = Rates(0.9 * DATASHEET.bandwidth, DATASHEET.exponentials, DATASHEET.products)
CEILINGS = {
    "copy_bytes_per_s": ("copy bandwidth, read plus written", "B/s"),
    "exponentials_per_s": ("exponentials", "/s"),
    "products_per_s": ("float32 multiply-adds", "/s"),
    "float32_flops_per_s": ("float32 matrix product", "FLOP/s"),
    "tf32_flops_per_s": ("TF32 matrix product", "FLOP/s"),
    "bf16_flops_per_s": ("bf16 matrix product", "FLOP/s"),
}
TITLES = {
    "memory_ops": "Operators",
    "meta_step": "One training iteration",
    "data_loading": "Loading",
    "evaluation": "Testing",
    "photometric": "Colours and blur",
}


# --- machines and what was measured on them -----------------------------------------------------------------------


def machine_lines(machines: list[Machine], document: Path) -> list[str]:
    """A line a record: where, with what, which commit."""
    rows = []
    for machine in machines:
        for name, part in machine.parts.items():
            facts = part.facts
            versions = ", ".join(f"{key} {facts[key]}" for key in ("torch", "triton", "cuda", "dali") if facts.get(key))
            # rows of several runs may stand in one record
            dates = sorted({row.get("date", facts.get("date", NOTHING)) for row in part.rows})
            commits = ", ".join(dict.fromkeys(str(row.get("commit", facts["commit"]))[:12] for row in part.rows))
            rows.append([machine.title, f"{name} ({link(part, document)})", versions, commits, ", ".join(dates)])
    return table(["machine", "bench", "versions", "commit", "date"], rows)


def result_lines(machines: list[Machine], document: Path) -> list[str]:
    """Everything that was measured, machine by machine."""
    lines = []
    for machine in machines:
        lines += [f"### {machine.title}", "", *ceiling_lines(machine), *step_status_lines(machine)]
        for name, title in TITLES.items():
            if name in machine.parts:
                first, *rest = part_lines(machine, name, document)
                lines += [f"**{title}.** {first}", *rest]
        lines += training_lines(machine)
        missing = [title.lower() for name, title in TITLES.items() if name not in machine.parts]
        lines += [f"Not measured here: {', '.join(missing)}.", ""] if missing else []
    return lines


def part_lines(machine: Machine, name: str, document: Path) -> list[str]:
    """A sentence, the tables and the picture of one bench."""
    part = machine.parts[name]
    row, record = part.rows[0], link(part, document)
    if name == "memory_ops":
        lines = [f"Medians; the sizes are those of `bench/cases.py` ({record}).", ""]
        lines += operator_table(Operators(machine))
        return [*lines, f"![Time over the least bytes, with ceilings](images/roofline-{machine.stem}.png)", ""]
    if name == "meta_step":
        lines = [f"{step_setup(machine, part, document)}.", "", *step_table(part)]
        return [*lines, f"![Seconds of an iteration by part, and peak memory](images/step-{machine.stem}.png)", ""]
    if name == "data_loading":
        workers, lines = loading_table(part)
        return [f"Images a second with {workers} workers ({record}).", "", *lines]
    if name == "evaluation":
        text = f"{row['architecture']}, images of {row['height']} x {row['width']}, tiles of {row['crop']}"
        return [f"{text} ({record}).", "", *evaluation_table(part)]
    text = f"`ops.photometric` on crops of {row['side']} x {row['side']}"
    return [f"{text} ({record}).", "", *photometric_table(part)]


def training_lines(machine: Machine) -> list[str]:
    """The short trainings of ``make gpu-check``: whether the loss falls and what the network scores."""
    header = ["training on generated streets", "iterations", "seconds", "loss, first and last", "mIoU"]
    rows = []
    for name, found in machine.record.get("training", {}).items():
        scores = ", ".join(f"{domain} {number(score)}" for domain, score in found["miou"].items())
        losses = several([found["first_loss"], found["last_loss"]])
        rows.append([name, str(found["iterations"]), number(found["seconds"]), losses, scores])
    return table(header, rows) if rows else []


def ceiling_lines(machine: Machine) -> list[str]:
    """What the machine can do, by measurement."""
    rates = machine.rates()
    known = [f"{text} {rate_of(rates[name])}{unit}" for name, (text, unit) in CEILINGS.items() if rates.get(name)]
    return [f"Ceilings, measured: {'; '.join(known)}.", ""] if known else []


def step_status_lines(machine: Machine) -> list[str]:
    """Steps of ``make gpu-check`` that did not end well, so that nobody takes a gap for a result."""
    steps = machine.record.get("steps", [])
    failed = [f"{step['name']} ({step['status']})" for step in steps if step["status"] != "ok"]
    fine = [step["name"] for step in steps if step["status"] == "ok"]
    lines = [f"`make gpu-check` here: {', '.join(fine)} ended well.", ""] if fine else []
    lines += [f"**Not so: {', '.join(failed)}.**", ""] if failed else []
    return lines + [line for problem in machine.record.get("problems", []) for line in (f"* {problem}", "")]


# --- asked and found ----------------------------------------------------------------------------------------------

Row = tuple[str, str, str, bool | None]
"""A target in words, what was asked and found, whether it was met; None where it was not measured."""


def asked_for(value: float, share: bool) -> str:
    """What was asked for, in the digits of the request."""
    return f"{100 * value:g} %" if share else f"{value:g}"


def operator_targets(machine: Machine | None, gpu: bool) -> list[Row]:
    """Targets of the operators, for the backend that the dispatch takes."""
    operators = Operators(machine) if machine else None
    records = {} if operators is None else operators.records
    cases = {(case.op, case.size): case for case in all_cases() if case.dtype == "float32"}
    rows: list[Row] = []
    for target in report.TARGETS_GPU if gpu else report.TARGETS_CPU:
        case = cases[target.op, target.size]
        taken = operators.taken(case) if operators else None
        found = report.find_quantity(target, taken, records) if taken else None
        share = target.quantity in ("memory", "copy")
        asked = f"{'at most' if target.at_most else 'at least'} {asked_for(target.asked, share)}"
        size = target.size.split("/")[0]
        name = f"{operator_name(case)}, {size}, {target.which}: {report.QUANTITIES[target.quantity]}"
        text = percent(found) if share else ratio(found)
        rows.append((name, asked, text, None if found is None else target.met(found)))
    return rows


def step_targets(part: Part | None, gpu: bool) -> list[Row]:
    """Targets of the iteration."""
    by_name = {row["variant"]: row for row in part.rows} if part else {}
    rows: list[Row] = []
    for target in step_report.TARGETS_GPU if gpu else step_report.TARGETS_CPU:
        found, share = target.found(by_name), target.quantity == "memory"
        asked = f"{'at least' if target.quantity == 'speed' else 'at most'} {asked_for(target.asked, share)}"
        name = f"`{target.variant}`: {step_report.QUANTITIES[target.quantity]} `{target.against}`"
        text = percent(found) if share else ratio(found)
        rows.append((name, asked, text, None if found is None else target.met(found)))
    return rows


def loading_targets(part: Part | None) -> list[Row]:
    """Targets of the loaders, by the clock, with the most workers that were measured."""
    if part is None:
        return []
    rows: list[Row] = []
    workers = max(row["workers"] for row in part.rows)
    for target in loading_report.TARGETS:
        compared = loading_report.ratios(part.rows, target, workers)
        pipeline, found = (target.pipeline, None) if compared is None else (compared[0], compared[1][0])
        name = f"`{pipeline}`, {' + '.join(target.files)}, {workers} workers: times faster than `{target.against}`"
        met = None if found is None else found >= target.asked
        rows.append((name, f"at least {target.asked:g}", ratio(found), met))
    return rows


def machine_targets(machine: Machine) -> list[Row]:
    """Asked and found on one machine."""
    return [
        *operator_targets(machine, machine.gpu),
        *step_targets(machine.parts.get("meta_step"), machine.gpu),
        *loading_targets(machine.parts.get("data_loading")),
    ]


def target_lines(machines: list[Machine]) -> list[str]:
    """A table a machine, and one of what is asked of a GPU while there is no record of any."""
    sections = [(machine.title, machine_targets(machine)) for machine in machines]
    if not any(machine.gpu for machine in machines):
        sections.append(("A GPU, not measured", [*operator_targets(None, True), *step_targets(None, True)]))
    verdicts = {True: "met", False: "**missed**", None: NOTHING}
    lines = []
    for title, rows in sections:
        met, known = sum(row[3] is True for row in rows), sum(row[3] is not None for row in rows)
        lines += [f"### {title}: {met} of {known} met" if known else f"### {title}", ""]
        lines += table(["target", "asked", "found", ""], [(*row[:3], verdicts[row[3]]) for row in rows])
    return lines


# --- a GPU --------------------------------------------------------------------------------------------------------


def predicted_cases() -> list[Case]:
    """The paper's size in both types, and the one that fills a GPU."""
    return [
        case
        for case in all_cases()
        if case.size.split("/")[0] == "paper" or (case.size.split("/")[0] == "fill" and case.dtype == "float32")
    ]


def prediction_lines(machines: list[Machine]) -> list[str]:
    """The least that each operator can take on an H100, computed, and what a GPU was measured to take."""
    gpus = [machine for machine in machines if machine.gpu and "memory_ops" in machine.parts]
    found = [Operators(machine) for machine in gpus]
    header = ["operator", "size", "MB", "bytes over 3.35 TB/s", "over nine tenths of that", "floor with arithmetic"]
    rows = []
    for case in predicted_cases():
        least = [work(case, which) for which in PASSES]
        size = case.size.split("/")[0] + ("" if case.dtype == "float32" else f", {case.dtype}")
        cells = [operator_name(case), size, several(each.moved / 1e6 for each in least)]
        cells += [durations([1e3 * each.moved / rates.bandwidth for each in least]) for rates in (DATASHEET, EXPECTED)]
        cells.append(durations([1e3 * report.floor_seconds(each, EXPECTED) for each in least]))
        cells += [durations(operators.passes(case, operators.taken(case))) for operators in found]
        rows.append(cells)
    none = [] if gpus else ["**Nothing was measured on a GPU yet**: no record names one.", ""]
    return none + table([*header, *(f"measured, {machine.title}" for machine in gpus)], rows)


# --- which backend ------------------------------------------------------------------------------------------------


def backend_lines(machines: list[Machine]) -> list[str]:
    """For every case the fastest kernel backend of a GPU, and whether the dispatch takes it."""
    compared = [machine for machine in machines if machine.gpu and len(machine.kernels()) > 1]
    if not compared:
        first, second = [name for name in BACKENDS if name in ("cuda", "triton")]
        text = f"On a GPU `{first}` comes before `{second}` for every call that both can take"
        return [f"{text}. Unproven: no record compares them.", ""]
    lines = []
    for machine in compared:
        operators = Operators(machine)
        rows = []
        for case in operators.cases:
            size = case.size.split("/")[0] + ("" if case.dtype == "float32" else f", {case.dtype}")
            times = [durations(operators.passes(case, name)) for name in operators.kernels]
            rows.append([operator_name(case), size, *times, operators.taken(case) or NOTHING, verdict(operators, case)])
        header = ["operator", "size", *operators.kernels, "the dispatch takes", "why"]
        lines += [f"{machine.title}, forward / backward / double backward:", "", *table(header, rows)]
    return lines


def verdict(operators: Operators, case: Case) -> str:
    """Why the backend that is taken is the right one, or that it is not: by the sum of the three passes."""
    taken = operators.taken(case)
    spans = {name: [operators.total(case, name, key) for key in ("p20_ms", "p80_ms")] for name in operators.kernels}
    known = {name: (low, high) for name, (low, high) in spans.items() if low is not None and high is not None}
    if taken not in known or len(known) < 2:
        return "the other was not measured"
    best = min(known, key=lambda name: operators.total(case, name) or 0)
    times = (operators.total(case, taken) or 0) / (operators.total(case, best) or 1)
    if best == taken:
        other = min(operators.total(case, name) or 0 for name in known if name != taken)
        return f"fastest, {ratio(other / (operators.total(case, taken) or 1))} times"
    # apart by more than the middle three fifths of the repeats
    if known[best][1] < known[taken][0]:
        return f"**{best} is {ratio(times)} times as fast**"
    return f"as fast as {best} within the spread"


def disagreements(machines: list[Machine]) -> list[str]:
    """A line for each case in which the dispatch takes the slower backend."""
    lines = []
    for machine in machines:
        operators = Operators(machine)
        for case in operators.cases if machine.gpu else ():
            why = verdict(operators, case)
            if why.startswith("**"):
                taken = operators.taken(case)
                lines.append(f"{machine.title}, {case.title}: the dispatch takes {taken}, but {why.strip('*')}")
    return lines
