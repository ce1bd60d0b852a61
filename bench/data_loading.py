"""Images a second and CPU time an image of loading training data: ``python bench/data_loading.py``.

The released code's way, the same law in torch workers with Pillow, and pmm_fast's two loaders, side by side on files of
the true sizes and encodings; each stage on its own besides.  Nothing is timed before every pipeline's first batch was
compared with the released one: same labels, same crops but for rounding, same look within a grey level.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import multiprocessing
import os
import resource
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import PIL
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import loading_pipelines as P
from bench import loading_report as report
from bench import loading_stages, released_loading
from bench.loading_files import KINDS, Files, ensure_files
from bench.memory_ops import first_line, versions
from bench.report import write_json
from pmm_fast.data.crop import crop_backend
from pmm_fast.data.loader import choose_loader

# rounds of a batch from each worker, at least, that a rate is made of
LEAST = 3


@dataclass(frozen=True)
class Scale:
    """How much is done: ``full`` to be measured, ``quick`` to see that all of it runs."""

    shrink: int
    crop: tuple[int, int]
    images: int
    seconds: float
    samples: int


FULL = Scale(shrink=1, crop=(768, 768), images=12, seconds=4.0, samples=6)
QUICK = Scale(shrink=8, crop=(96, 96), images=2, seconds=0.05, samples=1)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small files, few batches: that it runs, not how fast")
    parser.add_argument("--kinds", nargs="+", metavar="KIND", choices=KINDS, default=[*KINDS], help=", ".join(KINDS))
    names = [*P.PIPELINES]
    parser.add_argument("--pipelines", nargs="+", metavar="NAME", choices=names, default=names, help=", ".join(names))
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2], help="processes, or DALI's threads [1 2]")
    parser.add_argument("--seconds", type=float, help=f"watch each pipeline for so long [{FULL.seconds:g}]")
    parser.add_argument("--files", metavar="FOLDER", help="keep the generated files here [~/.cache/pmm_fast]")
    parser.add_argument("--json", metavar="FILE", help="write the records here, as a list; kept up to date")
    parser.add_argument("--plot", metavar="FILE", help="draw images a second, and CPU time an image by stage")
    options = parser.parse_args(argv)
    if min(options.workers) < 1:
        parser.error(f"--workers: expected 1 or more, got {min(options.workers)}")
    options.scale = QUICK if options.quick else FULL
    options.seconds = options.scale.seconds if options.seconds is None else options.seconds
    options.folder = Path(options.files or os.environ.get("PMM_FAST_CACHE") or "~/.cache/pmm_fast").expanduser()
    return options


# --- measuring ----------------------------------------------------------------------------------------------------


def cpu_seconds() -> float:
    """User and system time of this process and of all its child processes, running or ended."""
    total = 0.0
    for child in multiprocessing.active_children():
        # one that ends just now is among those that have ended
        with contextlib.suppress(FileNotFoundError):
            # what follows the name in brackets; counted from 1, utime and stime are fields 14 and 15
            fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
            total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        used = resource.getrusage(who)
        total += used.ru_utime + used.ru_stime
    return total


def watch(batches: P.Batches, workers: int, seconds: float) -> report.Throughput:
    """Take batches for some time, once the pipeline is warm; it stays ahead of what is taken to the end.

    With several workers batches come in bursts, so the time that counts for the error is that of as many batches.
    """
    group = workers
    for _ in range(workers):
        images = next(batches)[0]
    cpu, times = cpu_seconds(), [time.perf_counter()]
    while times[-1] - times[0] < seconds or len(times) <= LEAST * group or (len(times) - 1) % group:
        images = next(batches)[0]
        times.append(time.perf_counter())
    cpu = cpu_seconds() - cpu
    batches.close()
    turns = np.diff(times[::group])
    error = float(statistics.stdev(turns) / len(turns) ** 0.5 / turns.mean())
    return report.Throughput((len(times) - 1) * len(images), times[-1] - times[0], cpu, error)


# --- a run --------------------------------------------------------------------------------------------------------


def about() -> dict[str, object]:
    """What a record must say about where it was made."""
    dali = importlib.import_module("nvidia.dali").__version__ if choose_loader("auto")[0] == "dali" else None
    blur = f"scipy {importlib.import_module('scipy').__version__}" if released_loading.gaussian_filter else "numpy"
    ours = {"dali": dali, "pillow": PIL.__version__, "crop_backend": crop_backend()}
    return versions("cpu") | ours | {"released_blur": blur}


def usable(names: list[str]) -> tuple[list[str], list[str]]:
    """The pipelines that can run here, and a line for each that cannot."""
    if "dali" in names and choose_loader("auto")[0] != "dali":
        return [name for name in names if name != "dali"], [f"skipped: dali: {choose_loader('auto')[1]}"]
    return names, []


@dataclass
class Session:
    """One run of the bench: what it measures, and what has come out so far."""

    options: argparse.Namespace
    pipelines: list[str]
    about: dict[str, object]
    stages: dict[str, dict[str, loading_stages.Stages]] = field(default_factory=dict)
    records: list[report.Record] = field(default_factory=list)

    def files(self) -> list[Files]:
        """The files of every kind, drawn if need be, each with a line about their sizes."""
        scale, found = self.options.scale, []
        for name in self.options.kinds:
            files = ensure_files(self.options.folder, KINDS[name], scale.images, scale.shrink)
            width, height = files.size
            low, high = files.kind.megabytes
            print(
                f"{name}: {len(files.pairs)} images {width}x{height} of {files.megabytes(0):.2f} MB (true ones have "
                f"{low:g}-{high:g} MB at full size), labels {files.megabytes(1):.3f} MB",
                flush=True,
            )
            found.append(files)
        return found

    def setting(self, files: Files, workers: int) -> P.Setting:
        """What is loaded from some files."""
        return P.Setting(files, self.options.scale.crop, workers)

    def judge(self, files: Files) -> Iterator[tuple[bool, str]]:
        """Whether each pipeline does with these files what the released chain does, and a line that says so."""
        # in this process: nothing is loaded ahead that nobody takes
        setting = self.setting(files, 0)
        expected = P.expect(setting)
        for name in self.pipelines:
            try:
                fine, text = P.judge(name, setting, expected)
            except Exception as error:
                fine, text = False, first_line(error)
            yield fine, f"{files.kind.name}, {name}: {text}"

    def measure(self, files: Files, bar: tqdm) -> None:
        """Every pipeline with every number of workers, and the stages."""
        kind = files.kind.name
        bar.set_description(f"{kind}, stages")
        self.stages[kind] = loading_stages.measure(self.setting(files, 1), self.pipelines, self.options.scale.samples)
        bar.update()
        for workers in self.options.workers:
            found = {}
            for name in self.pipelines:
                bar.set_description(f"{kind}, {name}, {workers}")
                found[name] = watch(P.PIPELINES[name](self.setting(files, workers)), workers, self.options.seconds)
                bar.update()
            megabytes = {"image_mb": files.megabytes(0), "crop": list(self.options.scale.crop)}
            for record in report.records_of(kind, workers, found, self.stages[kind]):
                self.records.append(record | megabytes | {"quick": self.options.quick} | self.about)
                bar.write(report.row(record), file=sys.stdout)
        if self.options.json:
            write_json(self.options.json, self.records)

    def finish(self) -> None:
        """What is said at the end, and the picture."""
        print(f"\n{report.STAGE_HEADER}")
        for kind, found in self.stages.items():
            for name, stages in found.items():
                print(report.stage_row(kind, name, stages))
        print(report.LEGEND)
        lines = ["quick: no figure above is a measurement"] if self.options.quick else []
        for line in lines or report.target_lines(self.records):
            print(line)
        if self.options.plot:
            height, width = self.options.scale.crop
            title = f"Loading crops of {width} x {height}; {self.about['device']}, torch {self.about['torch']}"
            report.draw(self.options.plot, self.records, title)


def main(argv: list[str] | None = None) -> None:
    options = arguments(argv)
    # parallel work is the workers'; what the main process does for them has one thread
    torch.set_num_threads(1)
    facts = about()
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    pipelines, skipped = usable(options.pipelines)
    for line in skipped:
        print(line)
    session = Session(options, pipelines, facts)
    kinds, passed = session.files(), True
    for files in kinds:
        for fine, text in session.judge(files):
            passed &= fine
            print(f"gate: {'' if fine else 'FAILED: '}{text}", flush=True)
    if not passed:
        sys.exit("error: the gate failed, nothing is timed")
    print(f"\n{report.HEADER}", flush=True)
    total = len(kinds) * (1 + len(options.workers) * len(pipelines))
    with tqdm(total=total, disable=not sys.stderr.isatty()) as bar:
        for files in kinds:
            session.measure(files, bar)
    session.finish()


if __name__ == "__main__":
    main()
