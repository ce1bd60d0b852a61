"""The tables of a record of ``bench/gpu_check.py``, as Markdown: ``python bench/gpu_summary.py RECORD``.

First what is short: versions, ceilings, steps, tests that failed, targets, iterations.  Then the rows of the operators.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import gpu_record, report, step_report
from bench.gpu_record import Record

SHOWN = 12  # kinds of failures, and reasons of skipped tests
RATES = {
    "copy_bytes_per_s": ("copy, read plus written", 1e9, "GB/s"),
    "exponentials_per_s": ("exponentials", 1e9, "G/s"),
    "bf16_flops_per_s": ("bf16 matrix product", 1e12, "TFLOP/s"),
    "tf32_flops_per_s": ("TF32 matrix product", 1e12, "TFLOP/s"),
    "float32_flops_per_s": ("float32 matrix product", 1e12, "TFLOP/s"),
}


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table, none without rows."""
    lines = ["| " + " | ".join(cells) + " |" for cells in rows]
    return ["", "| " + " | ".join(head) + " |", "|" + "---|" * len(head), *lines] if lines else []


def short(record: Record) -> list[str]:
    """What is worth reading first."""
    versions = ", ".join(f"{name} {record.get(name)}" for name in ("torch", "triton", "cuda", "python"))
    lines = [f"# {record['device']}", "", f"{record['date']}, commit {record['commit']}; {versions}"]
    if record["rehearsal"]:
        lines += ["", "**A rehearsal: miniatures on a CPU. No figure here means anything.**"]
    lines += [f"* **{problem}**" for problem in record.get("problems", [])]
    rates = record.get("rates", {})
    named = ((text, f"{number(rates[key] / unit)} {of}") for key, (text, unit, of) in RATES.items() if key in rates)
    lines += table(("ceiling", "found"), named)
    lines += table(("step", "status", "s", "commit", "tests"), map(step_row, record["steps"]))
    lines += failures(record)
    head = ("training", "iterations", "first loss", "last loss", "mIoU")
    lines += table(head, (train_row(*item) for item in record.get("training", {}).items()))
    lines += targets(record)
    return lines + iterations(record)


def step_row(step: Record) -> list[str]:
    tests = step.get("tests")
    counts = ", ".join(f"{tests[key]} {key}" for key in ("passed", "failed", "skipped")) if tests else ""
    return [step["name"], step["status"], number(step["seconds"]), step["commit"], counts]


def failures(record: Record) -> list[str]:
    """Kinds of failures of tests, and why tests were skipped."""
    lines: list[str] = []
    for step in record["steps"]:
        tests = step.get("tests", {})
        for failure in tests.get("failures", [])[:SHOWN]:
            error, example = failure["error"][:150], failure["tests"][0]
            lines.append(f"* {step['name']}: {failure['count']} x `{error}`, e.g. {example}")
        for reason, count in list(tests.get("skips", {}).items())[:SHOWN]:
            lines.append(f"* {step['name']}: {count} skipped: {reason}")
    return ["", *lines] if lines else []


def train_row(name: str, found: Record) -> list[str]:
    scores = ", ".join(f"{domain} {'' if score is None else f'{score:.1%}'}" for domain, score in found["miou"].items())
    return [name, str(found["iterations"]), number(found["first_loss"]), number(found["last_loss"]), scores]


def targets(record: Record) -> list[str]:
    """Asked beside found, of every target."""
    rows = operator_targets(record.get("memory_ops", [])) + step_targets(record.get("meta_step", []))
    return table(("target", "asked", "found", ""), rows)


def verdict(met: bool | None) -> str:
    return "not measured" if met is None else "met" if met else "**MISSED**"


def operator_targets(rows: list[Record]) -> list[list[str]]:
    """A row a target; what counts is the better backend, the one that the dispatch should take."""
    by_key = {tuple(row[key] for key in gpu_record.ROWS["memory_ops"][0]): row for row in rows}
    found = []
    for target in report.TARGETS_GPU:
        values = {name: report.find_quantity(target, name, by_key) for name in ("cuda", "triton")}
        known = {name: value for name, value in values.items() if value is not None}
        form = "{:.0%}" if target.quantity == "copy" else "{:.3g}x"
        sign = "<=" if target.at_most else ">="
        texts = ", ".join(f"{name} {form.format(value)}" for name, value in known.items())
        title = f"{target.op} {target.size} {target.which}: {report.QUANTITIES[target.quantity]}"
        met = any(map(target.met, known.values())) if known else None
        found.append([title, f"{sign} {form.format(target.asked)}", texts, verdict(met)])
    return found


def step_targets(rows: list[Record]) -> list[list[str]]:
    """The same of the iteration."""
    by_name = {row["variant"]: row for row in rows}
    found = []
    for target in step_report.TARGETS_GPU:
        value = target.found(by_name)
        form = "{:.0%}" if target.quantity == "memory" else "{:.3g}x"
        sign = ">=" if target.quantity == "speed" else "<="
        title = f"{target.variant}: {step_report.QUANTITIES[target.quantity]} {target.against}"
        text = "" if value is None else form.format(value)
        asked = f"{sign} {form.format(target.asked)}"
        found.append([title, asked, text, verdict(None if value is None else target.met(value))])
    return found


def iterations(record: Record) -> list[str]:
    head = ("iteration", "images/s", "s", "peak GB", "x released", "x without anomaly mode", "compile s", "commit")
    rows = []
    for row in record.get("meta_step", []):
        values = (row["images_per_s"], row["seconds_per_step"], row["peak_bytes"] / 1e9)
        ratios = (row["ratio_released"], row["ratio_released_no_anomaly"], row.get("compile_seconds"))
        rows.append([row["variant"], *map(number, (*values, *ratios)), row["commit"]])
    return table(head, rows)


def long(record: Record) -> list[str]:
    """The rows of the operators, of the looks and of testing, and what the compilers say of the kernels."""
    kernels = record.get("resources", [])
    keys = [key for key in (kernels[0] if kernels else {}) if key not in ("commit", "date", "step")]
    looks = ([row["backend"], row["look"], number(row["ms_per_image"])] for row in record.get("photometric", []))
    return [
        *operators(record),
        *table(("photometric", "look", "ms an image"), looks),
        *evaluations(record),
        *table(keys, ([str(row.get(key, "")) for key in keys] for row in kernels)),
    ]


def operators(record: Record) -> list[str]:
    head = ("operator", "size", "dtype", "backend", "pass", "ms", "of bandwidth", "x released", "x reference", "commit")
    rows = []
    for row in record.get("memory_ops", []):
        cells = [row["op"], row["size"], row["dtype"], row["backend"], row["pass"], number(row["median_ms"])]
        ratios = ("bandwidth_share", "ratio_released", "ratio_reference")
        rows.append([*cells, *(number(row[name]) for name in ratios), row["commit"]])
    return table(head, rows)


def evaluations(record: Record) -> list[str]:
    head = ("evaluation", "way", "s an image", "network", "rest", "peak GB", "x released", "x plain")
    rows = []
    for row in record.get("evaluation", []):
        values = [row[name] for name in ("seconds", "network_seconds", "rest_seconds")]
        values += [row["peak_bytes"] / 1e9, row["times_released"], row["times_plain"]]
        rows.append([row["protocol"], row["way"], *map(number, values)])
    return table(head, rows)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("record", type=Path, metavar="RECORD", help="<device>.json")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write everything here, and print what is short")
    options = parser.parse_args(argv)
    record = gpu_record.read(options.record)
    if record is None:
        sys.exit(f"error: there is no {options.record}")
    first = "\n".join(short(record))
    everything = "\n".join([first, *long(record), ""])
    if options.out:
        options.out.write_text(everything)
    print(first if options.out else everything)


if __name__ == "__main__":
    main()
