"""Time and memory of the memory operators on every backend: ``python bench/memory_ops.py``.

Each operator runs forward, backward and double backward beside the released code's chain of operators, plain PyTorch,
and plain PyTorch under torch.compile, on the same inputs.  An implementation is timed only after its outputs, first and
second derivatives on these inputs passed the tolerances of the tests; one that does not is reported as FAILED, and the
exit status is 1.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import cases as C
from bench import harness, report, roofline
from bench.gate import Gate
from bench.revision import revision
from pmm_fast.ops import backends

KERNELS = ("cuda", "triton", "cpu")
# without arguments: this much time, of five minutes, so that a slow last case does not break the promise
LIMIT = 270.0
# what compiling a case may take on a slow machine
COMPILING = 45.0


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--full", action="store_true", help="every case, instead of the most telling ones")
    sizes = sorted({case.size.split("/")[0] for case in C.all_cases()})
    operators = list(dict.fromkeys(case.op for case in C.all_cases()))
    filters = parser.add_argument_group("filters (all cases that match, instead of the most telling ones)")
    filters.add_argument("--op", nargs="+", metavar="OP", choices=operators, help=", ".join(operators))
    filters.add_argument("--size", nargs="+", help=f"{', '.join(sizes)}, or one case as the table names it: paper/192")
    filters.add_argument("--dtype", nargs="+", choices=[*C.DTYPES], help=", ".join(C.DTYPES))
    names = (*KERNELS, *C.BASELINES)
    filters.add_argument("--backend", nargs="+", metavar="NAME", choices=names, help=", ".join(names))
    filters.add_argument("--pass", nargs="+", dest="passes", metavar="PASS", choices=C.PASSES, help=", ".join(C.PASSES))
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where to run [cuda if there is one]")
    parser.add_argument("--seconds", type=float, default=1.0, help="time spent on each implementation of a case [1]")
    parser.add_argument(
        "--limit",
        type=float,
        metavar="S",
        help=f"leave out what would not end within S seconds [{LIMIT:.0f}, or none]",
    )
    parser.add_argument("--json", metavar="FILE", help="write the records here, as a list; kept up to date")
    parser.add_argument("--csv", metavar="FILE", help="write the records here, as a table")
    parser.add_argument(
        "--plot", metavar="FILE", help="draw time over bytes and exponentials, with the measured limits"
    )
    options = parser.parse_args(argv)
    options.filtered = any((options.op, options.size, options.dtype, options.backend, options.passes))
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA device")
    if options.limit is None:
        options.limit = float("inf") if options.full or options.filtered else LIMIT
    return options


def chosen_cases(options: argparse.Namespace) -> list[C.Case]:
    """What the options ask for; without any, the paper's size, some bf16, and what a GPU needs to be filled."""

    def matches(case: C.Case) -> bool:
        kind = case.size.split("/")[0]
        if kind == "fill" and options.device == "cpu" and not options.size:
            return False
        if options.full or options.filtered:
            wanted = (options.op, case.op), (options.dtype, case.dtype)
            by_size = not options.size or kind in options.size or case.size in options.size
            return by_size and all(not names or name in names for names, name in wanted)
        if options.device == "cuda":
            return kind in ("paper", "fill")
        return kind in ("paper", "small") and (case.dtype == "float32" or case.size == "paper")

    return [case for case in C.all_cases() if matches(case)]


def usable_backends(options: argparse.Namespace) -> tuple[list[str], list[str]]:
    """The kernel backends to measure, and a line for each that is left out."""
    usable, lines = [], []
    for name in KERNELS:
        named = bool(options.backend) and name in options.backend
        reason = backends.missing(name)
        if reason is None and (name == "cpu") != (options.device == "cpu") and not backends.interpreted():
            reason = f"its tensors are not on {options.device}"
        if reason is None and name == "triton" and backends.interpreted() and not named:
            reason = "interpreted, which takes minutes; --backend triton runs it all the same"
        if reason is None and options.backend and not named:
            reason = "not asked for"
        if reason is None:
            usable.append(name)
        else:
            lines.append(f"skipped: {name}: {reason}")
    return usable, lines


def variants_of(case: C.Case, kernels: list[str], options: argparse.Namespace, compiling: bool) -> list[C.Variant]:
    """The implementations to set beside each other, kernels first."""
    wanted = options.backend or C.BASELINES
    variants = [C.backend_variant(case.op, name) for name in kernels]
    if case.op == "memory_pass":
        variants += [C.separate_variant(name) for name in kernels]
    if "reference" in wanted:
        variants.append(C.reference_variant(case.op))
    if "compiled" in wanted and compiling:
        variants.append(C.compiled_variant(case.op))
    # the released code computes in float32, and at the size that fills a GPU its maps would not fit into one
    if "released" in wanted and case.dtype == "float32" and case.size.split("/")[0] != "fill":
        variants.append(C.released_variant(case.op))
    return variants


@dataclass
class Outcome:
    """What running a case gave: measurements by implementation, failures, and remarks to be made once."""

    measured: dict[str, harness.Measured] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


def judged(gate: Gate, variant: C.Variant, twice: bool) -> str | None:
    """What is wrong with an implementation, if only that it raises, or None."""
    # the reference is what the rule compares with, so it passes by definition
    if variant.name == "reference":
        return None
    try:
        return gate.judge(variant, twice)
    except Exception as error:
        return first_line(error)


def run_case(
    case: C.Case, variants: list[C.Variant], options: argparse.Namespace, tick: Callable[[], object]
) -> Outcome:
    """Judge, weigh and time the implementations of a case."""
    device = torch.device(options.device)
    outcome, inputs = Outcome(), C.make_inputs(case, device)
    gate = Gate(case, inputs)
    second_wanted = "bwd2" in (options.passes or C.PASSES)
    runners: dict[str, harness.Runner] = {}
    twice = {}
    for variant in variants:
        # torch.compile refuses a second derivative; a backend that does is wrong
        twice[variant.name] = variant.name != "compiled"
        wrong = judged(gate, variant, twice[variant.name])
        tick()
        twice[variant.name] &= second_wanted
        if wrong is None:
            try:
                runner = harness.Runner(variant, inputs)
                peaks = harness.peaks(runner, device, twice[variant.name])
            except Exception as error:
                wrong = first_line(error)
        if wrong is None:
            runners[variant.name] = runner
            outcome.measured[variant.name] = harness.Measured(peak_bytes=peaks)
        else:
            outcome.failed[variant.name] = wrong
        tick()
    del gate
    clocks = harness.clocks(runners, device)
    for part in ("first", "second"):
        taking_part = {name: clocks[name] for name in outcome.measured if part == "first" or twice[name]}
        found, failed = harness.time_together(taking_part, part, options.seconds / 2, tick)
        for name, seconds in found.items():
            outcome.measured[name].seconds.update(seconds)
        for name, error in failed.items():
            outcome.failed[name] = first_line(error)
            del outcome.measured[name]
    for name, one in clocks.items():
        if isinstance(one, harness.GraphClock) and one.not_captured:
            passes = ", ".join(sorted(one.not_captured))
            outcome.remarks.append(f"{case.op}, {name}: {passes} cannot be captured in a CUDA graph, run as they are")
    return outcome


class Pace:
    """Whether a case would still end in time, by how long the ones before took for their size."""

    SLACK = 1.3

    def __init__(self, limit: float, device: str) -> None:
        self.start, self.limit, self.device = time.monotonic(), limit, device
        self.seconds = self.done = 0.0

    def weight(self, case: C.Case) -> float:
        """About proportional to the time that a case takes: maps as large as the labels, and repeats of small ones.

        On a GPU repeats are most of it, and compiling, whatever the size.
        """
        maps = 0.2 if case.op == "memory_read" else 1.0
        work = maps * case.batch * case.label_side**2 / (8 * 768**2)
        return 1 + work / 20 if self.device == "cuda" else 0.1 + work

    def add(self, case: C.Case, seconds: float) -> None:
        self.seconds += seconds
        self.done += self.weight(case)

    def fits(self, case: C.Case, extra: float = 0.0) -> bool:
        """Whether the case, and ``extra`` seconds, are expected to end before the limit."""
        expected = self.weight(case) * self.seconds / self.done * self.SLACK if self.done else 0.0
        return time.monotonic() - self.start + expected + extra < self.limit


def versions(device: str) -> dict[str, object]:
    """What a record must say about where it was made."""
    try:
        triton: str | None = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = None
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else harness.cpu_name(),
        "torch": torch.__version__,
        "triton": triton,
        "commit": revision(),
        "threads": torch.get_num_threads(),
        "date": datetime.date.today().isoformat(),
    }


@dataclass
class Session:
    """One run of the bench: what it measures, and what has come out so far."""

    options: argparse.Namespace
    cases: list[C.Case]
    kernels: list[str]
    rates: harness.Rates
    about: dict[str, object]
    measured: dict[C.Case, dict[str, harness.Measured]] = field(default_factory=dict)
    remarks: dict[str, None] = field(default_factory=dict)  # in order, each once
    left_out: list[C.Case] = field(default_factory=list)
    any_failed: bool = False

    def records(self, only: C.Case | None = None) -> list[report.Record]:
        """What the files hold, of all cases or of one."""
        passes = self.options.passes or list(C.PASSES)
        return [
            record | self.about
            for case, measured in self.measured.items()
            if only in (None, case)
            for record in report.records_of(case, measured, passes, self.rates)
        ]

    def run(self) -> None:
        """Every case that still fits; rows appear as they are measured.

        Compiling takes longer than all else, so where time is limited it comes last.
        """
        pace = Pace(self.options.limit, self.options.device)
        wanted = "compiled" in (self.options.backend or C.BASELINES)
        last = wanted and self.options.limit < float("inf")
        form = "{desc}: {percentage:3.0f}% [{elapsed}<{remaining}]"
        total = sum(map(pace.weight, self.cases))
        with tqdm(total=total, bar_format=form, file=sys.stderr, mininterval=0.5) as bar:
            for case in self.cases:
                target = bar.n + pace.weight(case)
                if pace.fits(case):
                    start = time.monotonic()
                    self._run_case(case, variants_of(case, self.kernels, self.options, not last), bar, target)
                    pace.add(case, time.monotonic() - start)
                else:
                    self.left_out.append(case)
                bar.update(target - bar.n)
            for case in [*self.measured] if last else []:
                if pace.fits(case, COMPILING):
                    self._run_case(case, [C.compiled_variant(case.op)], bar, total)
                else:
                    self.remarks["compiled: left out where there was no time left to compile; --full has it"] = None
        if wanted:
            self.remarks["compiled, bwd2: torch.compile does not differentiate its backward again"] = None

    def _run_case(self, case: C.Case, variants: list[C.Variant], bar: tqdm, target: float) -> None:
        """Measure implementations of a case, beside those that have been; the bar goes on to ``target``."""
        bar.set_description(case.title)
        step = (target - bar.n) / (max(len(variants), 1) * (2 + 2 * harness.ROUNDS))
        try:
            outcome = run_case(case, variants, self.options, lambda: bar.update(step))
        # as a rule too little memory for what the others are compared with
        except Exception as error:
            outcome = Outcome(failed={"gate": first_line(error)})
        for name, reason in outcome.failed.items():
            self.any_failed = True
            bar.write(f"{case.op:<23}{case.size:<11}{case.dtype:<8}{name:<14}FAILED: {reason}", file=sys.stdout)
        self.measured[case] = self.measured.get(case, {}) | outcome.measured
        for record in self.records(case):
            if record["backend"] in outcome.measured:
                bar.write(report.row(record), file=sys.stdout)
        self.remarks.update(dict.fromkeys(outcome.remarks))
        if case.dtype != "float32":
            self.remarks["released: computes in float32, so there is nothing to compare bf16 with"] = None
        if self.options.json:
            report.write_json(self.options.json, self.records())
        torch._dynamo.reset()
        gc.collect()
        if self.options.device == "cuda":
            torch.cuda.empty_cache()

    def finish(self) -> None:
        """What is said at the end, and the files."""
        options, records = self.options, self.records()
        print(report.LEGEND)
        for remark in self.remarks:
            print(remark)
        if self.left_out:
            names = ", ".join(case.title for case in self.left_out)
            print(f"left out, would not have ended within {options.limit:.0f} s (--limit): {names}")
        for line in report.target_lines(records, self.kernels, options.device, self.rates):
            print(line)
        if options.json:
            report.write_json(options.json, records)
        if options.csv:
            report.write_csv(options.csv, records)
        if options.plot:
            about = f"{self.about['device']}, {self.about['threads']} threads, torch {self.about['torch']}"
            roofline.draw(options.plot, records, self.rates.bandwidth, self.rates.exponentials, about)


def main(argv: list[str] | None = None) -> None:
    options = arguments(argv)
    cases = chosen_cases(options)
    if not cases:
        sys.exit("error: no case matches --op, --size and --dtype together")
    if options.device == "cuda":
        # the backward of a compiled graph is replayed here, so it may not reuse what forward saved
        torch._functorch.config.donated_buffer = False
    about = versions(options.device)
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    kernels, skipped = usable_backends(options)
    for line in skipped:
        print(line)
    rates = harness.measure_rates(torch.device(options.device))
    print(
        f"measured: copy {rates.bandwidth / 1e9:.1f} GB/s, {rates.exponentials / 1e9:.2f} G exponentials/s, "
        f"{rates.products / 1e9:.1f} G multiply-adds/s\n\n{report.HEADER}",
        flush=True,
    )
    session = Session(options, cases, kernels, rates, about | rates.facts())
    session.run()
    session.finish()
    sys.exit(session.any_failed)


if __name__ == "__main__":
    main()
