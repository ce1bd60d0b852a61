"""Time and memory of one training iteration beside the released code's: ``python bench/meta_step.py``.

One iteration is the step, SGD, and the memory's rewrite, on the same images and from the same weights for all: the
released recipe as shipped (with autograd's anomaly detection) and without that, and ours, order 1 and 2, in float32 and
under bf16 autocast, eager and compiled.  Nothing is timed before the released iteration and ours were found to be the
same mathematics, and the orders to be equal and apart where they must; otherwise the exit status is 1, as it is when a
variant fails.  On a CPU the variants take turns, so that what else the machine does hits all alike.  On a GPU, which
is ours alone, one comes after the other, and has all of its memory: a captured step sets much of it aside.

``--json`` writes a list of rows, one for each variant that was timed so far, kept up to date: the keys of
``step_report.KEYS`` (seconds are of a whole iteration with all waits; ``peak_bytes``: :func:`weigh`), then

* ``compiled_by``: the engine of a compiled step (``graph``, ``inductor``, ``cuda-graph``);
* ``compile_seconds``: until the compiled step ran; ``compile_split_s``: ``trace``, ``compile`` (or capture) and
  ``check``, the eager steps of the check included; ``graph_nodes``: operations in the graph; ``checked``: what the
  comparison with eager mode found; these are None where the step is not compiled;
* ``device``, ``threads``, ``torch``, ``commit`` and what else is the same for all rows: ``tf32``, ``engine``,
  ``architecture``, ``crop``, ``images_a_domain``.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import harness, report, step_gate, step_report
from bench.memory_ops import first_line, versions
from bench.phases import Clock
from bench.step_variants import VARIANTS, Iteration, Setup, Variant, new_iteration
from pmm_fast import meta


class Preset(NamedTuple):
    """Defaults of the options."""

    crop: tuple[int, int]
    images: int
    iterations: int
    limit: float
    tf32: bool
    engine: str
    variants: tuple[str, ...]


BASELINES = ("released", "released_no_anomaly")
EAGER = ("order1", "order2", "order1_bf16", "order2_bf16")
COMPILED = ("order1_compiled", "order2_compiled")
PRESETS = {
    "small": Preset((192, 192), 2, 4, 130.0, False, "graph", (*BASELINES, *EAGER, *COMPILED)),
    # the released code's PyTorch 1.9 has TF32 switched on
    "paper": Preset(
        (768, 768),
        4,
        10,
        600.0,
        True,
        "cuda-graph",
        (
            # what was asked for comes first, should time run out
            *(*BASELINES, "order2_bf16_compiled", "order1_bf16_compiled", "order2_bf16", "order1_bf16", "plain_bf16"),
            *("order2", "order1", "order2_compiled", "order1_compiled", "order2_bf16_checkpointed"),
            "order2_bf16_searched",
        ),
    ),
}


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="small", help="small, or paper: a GPU's [small]")
    parser.add_argument("--architecture", default="deeplabv3plus_resnet50")
    parser.add_argument("--channels", type=int, default=256, help="width of the feature map and the memory [256]")
    parser.add_argument("--crop", type=int, nargs=2, metavar=("H", "W"), help="pixels [192 192; paper: 768 768]")
    parser.add_argument("--images", type=int, help="images a domain, two domains [2; paper: 4]")
    parser.add_argument("--iterations", type=int, help="timed iterations of each variant, at most [4; paper: 10]")
    parser.add_argument(
        "--limit",
        type=float,
        metavar="S",
        help="no further round, and on a GPU no further variant, begins after S seconds [130; paper: 600]",
    )
    parser.add_argument("--variants", nargs="+", metavar="NAME", choices=VARIANTS, help=", ".join(VARIANTS))
    parser.add_argument("--engine", help="of compiled variants: graph, inductor, cuda-graph [graph; paper: cuda-graph]")
    parser.add_argument(
        "--tf32", action=argparse.BooleanOptionalAction, help="TF32 on a GPU, for all variants [off; paper: on]"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where to run [cuda if there is one]")
    parser.add_argument("--json", metavar="FILE", help="write the records here, as a list; kept up to date")
    parser.add_argument("--plot", metavar="FILE", help="draw the times by part, and the peak memory")
    options = parser.parse_args(argv)
    for name, value in PRESETS[options.preset]._asdict().items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    for name in ("images", "iterations"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: expected a positive number, got {getattr(options, name)}")
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA device")
    return options


@dataclass
class Session:
    """One run of the bench: what it measures, and what has come out so far."""

    setup: Setup
    options: argparse.Namespace
    about: dict[str, object]
    begin: float = field(default_factory=time.monotonic)
    measured: dict[Variant, harness.Measured] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    late: list[str] = field(default_factory=list)
    _compiling: dict[Variant, dict[str, object]] = field(default_factory=dict)
    _ready: dict[Variant, Iteration] = field(default_factory=dict)

    def records(self) -> list[step_report.Record]:
        """What the files hold: every variant that was timed."""
        timed = {variant: found for variant, found in self.measured.items() if found.seconds}
        return [
            record | self._compiling[variant] | self.about
            for variant, record in zip(timed, step_report.records_of(timed, self.setup), strict=True)
        ]

    def run(self, variants: list[Variant]) -> None:
        """Everything that there is time for."""
        alone = self.setup.device.type == "cuda"
        stages = [([variant], self.options.iterations) for variant in variants] if alone else self._turns(variants)
        total = len(variants) + sum(count for _, count in stages)
        with tqdm(total=total, desc="preparing", disable=not sys.stderr.isatty()) as bar:
            for added, count in stages:
                if alone:
                    self._ready.clear()
                    release_memory(self.setup.device)
                for variant in added:
                    bar.set_description(variant.name)
                    if alone and self.measured and self._is_late():
                        self.late.append(variant.name)
                    else:
                        self._prepare(variant)
                    bar.update()
                bar.set_description("rounds")
                for index in range(max(count, 1)):
                    # one round whatever it takes: a ratio needs both of its sides
                    if index == 0 or not self._is_late():
                        self._round()
                    bar.update()

    def _is_late(self) -> bool:
        return time.monotonic() - self.begin >= self.options.limit

    def _turns(self, variants: list[Variant]) -> list[tuple[list[Variant], int]]:
        """The eager variants first, then, once more, all of them: what joins, and for how many rounds.

        Compiling can take longer than all else; what is known before stands in the file if that is cut off.
        """
        compiled = [variant for variant in variants if variant.compiled]
        eager = [variant for variant in variants if not variant.compiled]
        rounds = self.options.iterations
        # a graph is traced in seconds; what an engine compiles may take minutes
        first = 1 if self.options.engine == "graph" else (rounds + 1) // 2
        first = first if compiled else rounds
        stages = [(eager, first)] if eager else []
        return stages + ([(compiled, rounds - first if eager else rounds)] if compiled else [])

    def _prepare(self, variant: Variant) -> None:
        """Build a variant, run it to be warm, and weigh it."""
        try:
            iteration, kept, peak = weigh(lambda: new_iteration(variant, self.setup), self.setup.device)
        except Exception as error:
            self.failed[variant.name] = first_line(error)
        else:
            self._ready[variant], self._compiling[variant] = iteration, compile_facts(iteration)
            self.measured[variant] = harness.Measured(peak_bytes={"step": peak, "kept": kept})
        release_memory(self.setup.device)

    def _round(self) -> None:
        """Every variant once; one that fails, out of memory beside a captured graph say, loses its place."""
        for variant, iteration in list(self._ready.items()):
            clock = Clock(self.setup.device)
            remainder = "compiled" if variant.compiled else "forward"
            try:
                found = clock.measure(partial(iteration, clock), remainder)
            except Exception as error:
                self.failed[variant.name] = first_line(error)
                del self._ready[variant], self.measured[variant], iteration
                release_memory(self.setup.device)
                continue
            for which, seconds in found.items():
                self.measured[variant].seconds.setdefault(which, []).append(seconds)
        if self.options.json:
            report.write_json(self.options.json, self.records())

    def finish(self) -> None:
        """The table, the targets, and the picture."""
        records = self.records()
        print(f"\n{step_report.HEADER}")
        for record in records:
            print(step_report.row(record))
        for name, reason in self.failed.items():
            print(f"{name:<24}NOT AVAILABLE: {reason}")
        for name in self.late:
            print(f"{name:<24}NOT MEASURED: {self.options.limit:g} s were over")
        print(step_report.LEGEND)
        for line in step_report.target_lines(records, self.options.device):
            print(line)
        if self.options.plot and records:
            setup = self.setup
            size = f"{setup.architecture}, 2 x {setup.images} images of {setup.crop[0]} x {setup.crop[1]}"
            about = f"{self.about['device']}, {self.about['threads']} threads, torch {self.about['torch']}"
            step_report.draw(self.options.plot, records, f"{size}; {about}")


def compile_facts(iteration: Iteration) -> dict[str, object]:
    """The columns of a row that are about a compiled step; None where nothing was compiled."""
    step = iteration.step
    if not isinstance(step, meta.CompiledStep):
        return dict.fromkeys(("compiled_by", "compile_seconds", "compile_split_s", "graph_nodes", "checked"))
    split = {"trace": step.trace_seconds, "compile": step.compile_seconds, "check": step.check_seconds}
    return {
        "compiled_by": step.engine,
        "compile_seconds": sum(split.values()),
        "compile_split_s": split,
        "graph_nodes": step.nodes,
        "checked": "; ".join(map(str, step.agreements)),
    }


def weigh(build: Callable[[], Iteration], device: torch.device) -> tuple[Iteration, int, int]:
    """A variant after two iterations, the bytes that it keeps between them, and the most that it held in the second.

    Everything counts that the variant has: parameters, their copies, gradients that stay, momentum, images, and what
    the iteration allocates.  A captured graph has memory of its own, which is set aside rather than allocated.
    """
    peak_of = harness.cuda_peak if device.type == "cuda" else harness.cpu_peak
    held: list[Iteration] = []
    clock = Clock(device)

    def begin() -> None:
        held.append(build())
        held[0](clock)
        gc.collect()

    before = set_aside(device)
    _, kept, _ = peak_of(begin)
    pool = set_aside(device) - before
    most, _, _ = peak_of(lambda: held[0](clock))
    captured = isinstance(held[0].step, meta.CompiledStep) and held[0].step.engine == "cuda-graph"
    return held[0], kept, kept + most + (pool if captured else 0)


def set_aside(device: torch.device) -> int:
    """Bytes that a GPU's allocator keeps and cannot give back, without tensors in them."""
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def release_memory(device: torch.device) -> None:
    """Drop what a variant has left behind, so that the next one finds the same room."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def passes_gate(setup: Setup, variants: list[Variant]) -> bool:
    """Run the gate and print it."""
    start, passed = time.monotonic(), True
    for fine, text in step_gate.judge(setup, variants):
        passed &= fine
        print(f"gate: {'' if fine else 'FAILED: '}{text}", flush=True)
    print(f"gate: {time.monotonic() - start:.0f} s", flush=True)
    release_memory(setup.device)
    return passed


def main(argv: list[str] | None = None) -> None:
    options = arguments(argv)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = options.tf32
    device = torch.device(options.device)
    setup = Setup(
        options.architecture,
        (options.crop[0], options.crop[1]),
        options.images,
        device,
        options.channels,
        engine=options.engine,
    )
    variants = [VARIANTS[name] for name in options.variants]
    about = versions(options.device) | {"tf32": options.tf32, "engine": options.engine}
    about |= {"architecture": setup.architecture, "crop": list(setup.crop), "images_a_domain": setup.images}
    print(", ".join(f"{key} {value}" for key, value in about.items()), flush=True)
    session = Session(setup, options, about)
    if not passes_gate(setup, variants):
        sys.exit("error: the gate failed, nothing is timed")
    session.run(variants)
    session.finish()
    sys.exit(bool(session.failed))


if __name__ == "__main__":
    main()
